-- Records a version before the first engine loads it, so that a learner that goes on after a crash knows which versions
-- tokens may carry. O(1). May be repeated; an older version changes nothing.
-- ARGV: version ("lineage.number"), its number, the step that made the version. Returns 1 if no newer version is known.
local version, number, step = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local known = redis.call('HGET', meta, 'newest_version')
if known and tonumber(string.match(known, '%.(%d+)$')) > number then return 0 end
if known ~= version then
  redis.call('HSET', meta, 'newest_version', version, 'newest_step', step)
  note('version', version, 'step', step)
end
return 1
