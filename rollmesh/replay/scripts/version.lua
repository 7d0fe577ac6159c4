-- A version serves: the slots of what was trained up to the step that made it are free. O(log N + slots set free).
-- ARGV: version ("lineage.number"), its number, the step that made it. May be repeated; an older version changes nothing.
-- Returns how many slots became free.
local version, number, step = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local known = redis.call('HGET', meta, 'committed_version')
if known and tonumber(string.match(known, '%.(%d+)$')) > number then return 0 end
if known ~= version then
  redis.call('HSET', meta, 'committed_version', version, 'committed_step', step)
  note('version', version, 'step', step)
end
return redis.call('ZREMRANGEBYSCORE', slots, '-inf', step)
