-- (new) → PENDING, with a slot and the next place in the line. O(ids · log N).
-- ARGV: number of slots (-1: any), place in the line of the first id (-1: the next place), then the ids.
-- A group that exists stays as it is. If the place of an id is taken, the call is a repeated one: no group is opened
-- for the id, because its group may have ended and lost its row meanwhile.
-- Returns the rows of the ids that have a row afterwards, or an error if the ledger is closed and an id is new.
local num_slots, first = tonumber(ARGV[2]), tonumber(ARGV[3])
local is_closed = redis.call('HEXISTS', meta, 'closed') == 1
local num_opened = tonumber(redis.call('HGET', meta, 'opened') or '0')
local rows = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  local has_row = redis.call('EXISTS', row_prefix .. id) == 1
  local is_new = not has_row and not (first >= 0 and first + i - 4 < num_opened)
  if is_new and is_closed then return redis.error_reply('CLOSED the ledger is closed') end
  if is_new and (num_slots < 0 or redis.call('ZCARD', slots) < num_slots) then
    local sequence = redis.call('HINCRBY', meta, 'opened', 1) - 1
    redis.call('ZADD', line, sequence, id)
    redis.call('HSET', row_prefix .. id, 'id', id, 'sequence', sequence, 'attempt', 0, 'token', 0)
    redis.call('ZADD', slots, '+inf', id)
    move(id, 'pending', 'pending', sequence)
    has_row = true
  end
  if has_row then rows[#rows + 1] = read_row(id) end
end
return rows
