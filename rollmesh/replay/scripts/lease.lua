-- PENDING → LEASED, lowest sequence first. O(limit · log N).
-- ARGV: member, time to live in ms, limit, request id, number of slots (A; -1: any).
-- Returns the rows of the leased groups. A repeated request gets the leases of the first request.
-- The first write needs memory on purpose: when memory is full, no group is leased.
local member, ttl_ms, limit, request = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local num_slots = tonumber(ARGV[6])
local rows = {}

-- Returns how many groups that hold a slot stand before this place in the line. O(log N). Groups of a batch count wherever
-- they stand. So a group may wait until the batch has given its slots back, but no group is leased too early.
local function num_before(sequence)
  local count = redis.call('ZCARD', index.batched) + redis.call('ZCOUNT', slots, '-inf', '(+inf')
  for _, state in ipairs({'pending', 'leased', 'ready'}) do
    count = count + redis.call('ZCOUNT', index[state], '-inf', '(' .. sequence)
  end
  return count
end

if redis.call('HGET', requests, member) == request then
  for _, id in ipairs(leases_of(member, -1)) do
    if redis.call('HGET', row_prefix .. id, 'request') == request then rows[#rows + 1] = read_row(id) end
  end
  return rows
end
local deadline = now_ms() + ttl_ms
-- After a resume more than A groups may hold a slot. The proof of the staleness bound (see `staleness`) counts fewer
-- than A of them before a group that is being generated: the others wait.
local is_over = num_slots >= 0 and redis.call('ZCARD', slots) > num_slots
local waiting = redis.call('ZRANGE', index.pending, 0, limit - 1, 'WITHSCORES')
for i = 1, #waiting, 2 do
  local id, sequence = waiting[i], waiting[i + 1]
  if is_over and num_before(sequence) >= num_slots then break end
  redis.call('HSET', requests, member, request)
  redis.call('HSET', row_prefix .. id, 'request', request, 'returned', '')
  redis.call('ZADD', deadlines, deadline, id)
  redis.call('ZADD', holders, 0, holding(member, id))
  move(id, 'pending', 'leased', sequence, 'token', redis.call('HINCRBY', meta, 'token', 1), 'member', member)
  rows[#rows + 1] = read_row(id)
end
return rows
