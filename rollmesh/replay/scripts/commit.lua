-- LEASED → READY, for many groups at once. Each group has its own answer. O(groups · log N).
-- ARGV: for each group its id, fencing token, key of the payload, number of samples, number of tokens, oldest version.
-- The worker wrote the payload just before, under a key that ends by itself unless this script keeps it. Therefore a
-- worker that dies between the two writes leaves nothing behind.
-- Returns for each group 'accepted', 'duplicate' (this lease has committed before), 'fenced' (the lease is over or
-- superseded), 'missing' (there is no payload), or an error.
local now = now_ms()
local ids, scored, holdings = {}, {}, {}

local function commit(id, token, payload, num_samples, num_tokens, oldest_version)
  local row = redis.call('HMGET', row_prefix .. id, 'state', 'token', 'member', 'sequence')
  local state, current_token, member, sequence = unpack(row)
  if current_token == token and (state == 'ready' or state == 'batched' or state == 'trained') then
    return 'duplicate'
  end
  if current_token == token and state == 'retired' then
    redis.call('UNLINK', payload)
    return 'duplicate'
  end
  if not holds(id, state, current_token, token, now) then
    redis.call('UNLINK', payload)
    return 'fenced'
  end
  if redis.call('PERSIST', payload) == 0 and redis.call('EXISTS', payload) == 0 then return 'missing' end
  write_row(id, 'ready',
    'payload', payload, 'num_samples', num_samples, 'num_tokens', num_tokens, 'oldest_version', oldest_version)
  ids[#ids + 1] = id
  holdings[#holdings + 1] = holding(member, id)
  scored[#scored + 1] = sequence
  scored[#scored + 1] = id
  return 'accepted'
end

local answers = {}
for i = 2, #ARGV, 6 do
  local is_done, answer = pcall(commit, unpack(ARGV, i, i + 5))
  if not is_done and type(answer) == 'string' then answer = redis.error_reply(answer) end
  answers[#answers + 1] = answer
end
if #ids == 0 then return answers end
call_all('ZREM', deadlines, ids)
call_all('ZREM', holders, holdings)
reindex('leased', 'ready', ids, scored)
-- The learner said how many groups it waits for. Waking the learner for each group would cost more than reading a
-- group.
local size = tonumber(redis.call('HGET', meta, 'batch_size') or '1')
if redis.call('ZCARD', index.ready) >= size or is_all_done() then wake_learner() end
return answers
