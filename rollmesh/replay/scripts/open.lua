-- (new) → PENDING, with a slot and the next place in the line. O(ids · log N).
-- ARGV: number of slots that may be taken (-1: any), then the ids. A group that exists is left as it is.
-- Returns the rows of those ids that exist afterwards, or an error where a new one meets a closed ledger.
local num_slots = tonumber(ARGV[2])
local is_closed = redis.call('HEXISTS', meta, 'closed') == 1
local rows = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local exists = redis.call('EXISTS', row_prefix .. id) == 1
  local has_room = num_slots < 0 or redis.call('ZCARD', slots) < num_slots
  if not exists and is_closed then return redis.error_reply('CLOSED the ledger is closed') end
  if not exists and has_room then
    local sequence = redis.call('RPUSH', line, id) - 1
    redis.call('HSET', row_prefix .. id, 'id', id, 'sequence', sequence, 'attempt', 0, 'token', 0)
    redis.call('ZADD', slots, '+inf', id)
    move(id, 'pending', 'pending', sequence)
  end
  if exists or has_room then rows[#rows + 1] = read_row(id) end
end
return rows
