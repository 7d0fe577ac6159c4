-- LEASED → PENDING or FAILED, for overdue leases, or for all leases of one member. O(limit · log N).
-- ARGV: name of the member ('': overdue leases of all members), reason, attempts allowed, limit.
-- Returns the rows of the groups.
local member, reason, max_attempts, limit = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local ids
if member == '' then
  ids = redis.call('ZRANGEBYSCORE', deadlines, '-inf', now_ms(), 'LIMIT', 0, limit)
else
  ids = leases_of(member, limit)
end
local rows = {}
for _, id in ipairs(ids) do
  local holder, sequence, attempt = unpack(redis.call('HMGET', row_prefix .. id, 'member', 'sequence', 'attempt'))
  drop_lease(id, holder)
  end_attempt(id, sequence, tonumber(attempt), max_attempts, reason)
  rows[#rows + 1] = read_row(id)
end
return rows
