-- Takes or renews the right to drive the run. O(1).
-- ARGV: 'take' | 'renew', the run's id, fingerprint of the configuration, token of the process, time to live in ms.
-- Returns 'mine', 'held' (another process drives this run now), 'other' (the keys belong to another run), or 'gone'
-- (the server lost the run's keys, and there is no claim to renew).
-- A renewal in time writes nothing that needs memory, so that a run goes on when memory is full.
local mode, id, fingerprint, token, ttl_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local known = redis.call('HGET', identity, 'id')
if known and known ~= id then return 'other' end
if not known and mode == 'renew' then return 'gone' end
if not known and redis.call('EXISTS', line, meta) > 0 then return 'other' end
local current = redis.call('GET', owner)
if current and current ~= token then return 'held' end
if current and redis.call('PEXPIRE', owner, ttl_ms) == 1 then return 'mine' end
redis.call('SET', owner, token, 'PX', ttl_ms)
if not known then
  redis.call('HSET', identity, 'id', id, 'fingerprint', fingerprint, 'created_s', redis.call('TIME')[1])
end
redis.call('HSET', identity, 'state', 'running')
return 'mine'
