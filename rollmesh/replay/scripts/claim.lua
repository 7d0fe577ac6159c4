-- Takes, renews or gives back the right to drive the run. O(1).
-- ARGV: 'take' | 'renew' | 'end' | 'release', the run's id, fingerprint of the configuration, time to live in ms, and:
--   take: '1' if an interrupted run of the same fingerprint may be adopted, whatever its id;
--   renew, end, release: the term that 'take' gave; for 'end' and 'release' also the state that the run ended in.
-- Returns {'mine', term, id of the run, state before}, {'held'} (another process drives this run now), {'other'} (the
-- keys belong to another run), {'changed'} (they would be adopted if the fingerprint were the same), {'superseded',
-- current term} (another process has taken the run), or {'gone'} (the server lost the run's keys).
-- Each 'take' gives a new term. A process with the run's id takes the run at once, even from a process that lives: the
-- scripts refuse the older term from then on. Each mode begins with a write that needs no memory, so that a coordinator
-- comes back, and a run goes on and ends, when memory is full.
local mode, id, fingerprint, ttl_ms = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local known, known_fingerprint, state = unpack(redis.call('HMGET', identity, 'id', 'fingerprint', 'state'))

if mode == 'take' then
  if not known and redis.call('EXISTS', line, meta) > 0 then return {'other'} end
  if known and known ~= id then
    if ARGV[6] ~= '1' or state == 'finished' or state == 'failed' then return {'other'} end
    if redis.call('EXISTS', owner) == 1 then return {'held'} end
    if known_fingerprint ~= fingerprint then return {'changed'} end
    id = known
  end
  redis.call('DEL', owner)
  local term = tostring(redis.call('HINCRBY', meta, 'coordinator_term', 1))
  redis.call('SET', owner, term, 'PX', ttl_ms)
  if not known then redis.call('HSET', identity, 'id', id, 'created_s', redis.call('TIME')[1]) end
  redis.call('HSET', identity, 'fingerprint', fingerprint, 'state', 'running')
  note('coordinator', term)
  return {'mine', term, id, state or ''}
end

local term, to = ARGV[6], ARGV[7]
local current = redis.call('HGET', meta, 'coordinator_term')
if not known or not current then return {'gone'} end
if known ~= id then return {'other'} end
if current ~= term then return {'superseded', current} end
if redis.call('PEXPIRE', owner, ttl_ms) == 0 then redis.call('SET', owner, term, 'PX', ttl_ms) end
if mode ~= 'renew' then redis.call('HSET', identity, 'state', to) end
if mode == 'release' then redis.call('DEL', owner) end
return {'mine', term, id, state or ''}
