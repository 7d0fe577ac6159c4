-- LEASED → PENDING, FAILED or FILTERED, on behalf of the lease's holder. O(log N).
-- ARGV: id, fencing token, 'pending' | 'failed' | 'filtered', reason, attempts allowed (for 'pending').
-- Returns the new state, and the same state for a repeated call; nothing if the lease is over or superseded.
local id, token, to, reason, max_attempts = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local row = redis.call('HMGET', row_prefix .. id, 'state', 'token', 'member', 'sequence', 'attempt', 'returned')
local state, current_token, member, sequence, attempt, returned = unpack(row)
if returned == token then return state end
if not holds(id, state, current_token, token, now_ms()) then return false end
drop_lease(id, member)
if to == 'filtered' then
  end_group(id, to, sequence, 'reason', reason)
else
  to = end_attempt(id, sequence, tonumber(attempt), to == 'failed' and 0 or max_attempts, reason)
end
redis.call('HSET', row_prefix .. id, 'returned', token)
return to
