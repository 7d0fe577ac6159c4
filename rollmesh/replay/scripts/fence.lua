-- Stands between the prelude and a script that the coordinator calls. O(1). The last argument is the coordinator's term.
-- Each coordinator that takes the run gets a new term. A coordinator that was believed dead, and lives, can therefore
-- change nothing. No term is known if the server lost the run's keys: then nothing is written into the empty ledger.
do
  local term = table.remove(ARGV)
  local current = redis.call('HGET', meta, 'coordinator_term') or '0'
  if current == '0' and term ~= '0' then return redis.error_reply('LOST the run\'s keys are gone') end
  if current ~= term then
    return redis.error_reply('SUPERSEDED another coordinator of this run has taken over: the current term is '
      .. current .. ', and this coordinator has term ' .. term)
  end
end
