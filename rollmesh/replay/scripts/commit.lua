-- LEASED → READY. O(log N).
-- ARGV: id, fencing token, key of the payload, samples, tokens, oldest version. The payload was written just before, as
-- a key that ends by itself unless this script keeps it: who dies in between leaves nothing behind.
-- Returns accepted, duplicate (this lease has committed already), fenced, or missing (there is no payload).
local id, token, payload = ARGV[2], ARGV[3], ARGV[4]
local row = redis.call('HMGET', row_prefix .. id, 'state', 'token', 'member', 'sequence')
local state, current_token, member, sequence = unpack(row)
if current_token == token and (state == 'ready' or state == 'batched' or state == 'trained') then return 'duplicate' end
if current_token == token and state == 'retired' then
  redis.call('UNLINK', payload)
  return 'duplicate'
end
if not holds(id, state, current_token, token) then
  redis.call('UNLINK', payload)
  return 'fenced'
end
if redis.call('EXISTS', payload) == 0 then return 'missing' end
redis.call('PERSIST', payload)
drop_lease(id, member)
move(id, 'leased', 'ready', sequence,
  'payload', payload, 'num_samples', ARGV[5], 'num_tokens', ARGV[6], 'oldest_version', ARGV[7])
-- The learner said how many it waits for. To wake it for each single group would cost more than to read the group.
local size = tonumber(redis.call('HGET', meta, 'batch_size') or '1')
if redis.call('ZCARD', index.ready) >= size or is_all_done() then wake_learner() end
return 'accepted'
