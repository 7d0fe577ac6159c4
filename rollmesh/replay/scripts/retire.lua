-- TRAINED → RETIRED, for steps that a durable checkpoint covers: the payload goes, the row stays. O(limit · log N).
-- ARGV: last step covered, limit. Returns how many.
local ids = redis.call('ZRANGEBYSCORE', index.trained, '-inf', ARGV[2], 'LIMIT', 0, tonumber(ARGV[3]))
for _, id in ipairs(ids) do
  local payload, step = unpack(redis.call('HMGET', row_prefix .. id, 'payload', 'step'))
  redis.call('UNLINK', payload)
  move(id, 'trained', 'retired', step, 'payload', '')
end
return #ids
