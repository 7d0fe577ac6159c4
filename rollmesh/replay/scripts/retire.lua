-- TRAINED → RETIRED, for steps that a durable checkpoint covers: the payload goes, the row stays. O(limit · log N).
-- ARGV: last step covered, limit. Returns how many.
local trained = redis.call('ZRANGEBYSCORE', index.trained, '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, tonumber(ARGV[3]))
local ids, scored = {}, {}
for i = 1, #trained, 2 do
  local id, step = trained[i], trained[i + 1]
  redis.call('UNLINK', redis.call('HGET', row_prefix .. id, 'payload'))
  ids[#ids + 1] = id
  scored[#scored + 1] = step
  scored[#scored + 1] = id
end
reindex('trained', 'retired', ids, scored)
for _, id in ipairs(ids) do write_row(id, 'retired', 'payload', '') end
return #ids
