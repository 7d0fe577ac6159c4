-- A learner takes the queue over and goes on after a step. The groups of later steps are READY again, or PENDING if
-- their payload is gone. O(limit · log N + steps).
-- The learner calls the script until the script moves fewer groups than `limit`. The call may be repeated.
-- ARGV: the step, limit, prefix of the keys of batches, the learner's term ('' at the first call).
-- Returns {term, number of groups that are READY again, number of groups that are PENDING again, number of moved
-- groups}, or an error if groups of a later step are retired, or if the ledger does not know the step.
local step, limit, record_prefix, term = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local taken = tonumber(redis.call('HGET', meta, 'taken_step') or '0')
if term == '' then
  local gone = math.max(
    tonumber(redis.call('HGET', meta, 'payloads_gone_step') or '0'),
    tonumber(redis.call('HGET', meta, 'retired_step') or '0'))
  if gone > step then
    return redis.error_reply('RETIRED the groups of the steps through ' .. gone .. ' are retired: nothing is left to '
      .. 'train on again after step ' .. step)
  end
  if taken < step then
    return redis.error_reply('BEHIND the ledger knows the steps through ' .. taken .. ', not through ' .. step)
  end
  term = tostring(redis.call('HINCRBY', meta, 'learner_term', 1))
else
  local refusal = refuse_other_term(term)
  if refusal then return refusal end
end

-- The checkpoint covers these groups, but the former learner did not mark them as trained.
local num_moved, num_ready, num_pending = 0, 0, 0
local covered = redis.call('ZRANGEBYSCORE', index.batched, '-inf', step, 'WITHSCORES', 'LIMIT', 0, limit)
for i = 1, #covered, 2 do
  local id, of_step = covered[i], covered[i + 1]
  move(id, 'batched', 'trained', of_step)
  redis.call('ZADD', slots, 'XX', of_step, id)
  num_moved = num_moved + 1
end

for _, state in ipairs({'trained', 'batched'}) do
  local later = redis.call('ZRANGEBYSCORE', index[state], '(' .. step, '+inf', 'LIMIT', 0, limit - num_moved)
  for _, id in ipairs(later) do
    local sequence, payload = unpack(redis.call('HMGET', row_prefix .. id, 'sequence', 'payload'))
    redis.call('ZADD', slots, '+inf', id)
    if redis.call('EXISTS', payload) == 1 then
      redis.call('HDEL', row_prefix .. id, 'step')
      move(id, state, 'ready', sequence)
      num_ready = num_ready + 1
    else
      send_back(id, state, sequence, 'its samples were dropped before a checkpoint covered them')
      num_pending = num_pending + 1
    end
    num_moved = num_moved + 1
  end
end

if num_moved < limit then
  for later = step + 1, taken do redis.call('UNLINK', record_prefix .. later) end
  redis.call('HSET', meta, 'taken_step', step, 'num_steps', step)
  -- The run may now have more steps than before. The coordinator closes the ledger again once the line is complete.
  redis.call('HDEL', meta, 'last_step', 'closed')
  note('learner', term, 'step', step)
end
return {term, num_ready, num_pending, num_moved}
