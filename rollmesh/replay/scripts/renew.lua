-- Sets new deadlines for the leases that are current and not over. O(leases · log N). A lease that is over stays over.
-- ARGV: time to live in ms; for each lease the id of its group and its fencing token.
-- Returns the ids of the groups whose lease is over.
local now, ttl_ms = now_ms(), tonumber(ARGV[2])
local ended = {}
for i = 3, #ARGV, 2 do
  local id, token = ARGV[i], ARGV[i + 1]
  local state, current_token = unpack(redis.call('HMGET', row_prefix .. id, 'state', 'token'))
  if holds(id, state, current_token, token, now) then
    -- The removal comes first, as in `reindex`, so that leases are renewed when memory is full.
    redis.call('ZREM', deadlines, id)
    redis.call('ZADD', deadlines, now + ttl_ms, id)
  else
    ended[#ended + 1] = id
  end
end
return ended
