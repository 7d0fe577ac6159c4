-- Common to all transitions. KEYS is `Keys.for_scripts`, ARGV[1] the prefix of the rows; arguments of a script's own
-- follow. N is the number of groups that have a row. `num_ended_kept` is defined before (see `scripts.py`).
local index = {
  pending = KEYS[1], leased = KEYS[2], ready = KEYS[3], batched = KEYS[4],
  trained = KEYS[5], retired = KEYS[6], filtered = KEYS[7], failed = KEYS[8],
}
local slots, deadlines, holders, line, meta, requests, journal, wake, ended, totals, reasons, identity, owner =
  unpack(KEYS, 9)
local row_prefix = ARGV[1]

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function read_row(id)
  return redis.call('HGETALL', row_prefix .. id)
end

-- O(1). One element is enough: whoever pops it looks at everything.
local function wake_learner()
  if redis.call('EXISTS', wake) == 0 then redis.call('RPUSH', wake, '1') end
end

-- O(1). Whether no group will become ready any more.
local function is_all_done()
  return redis.call('HEXISTS', meta, 'closed') == 1
    and redis.call('ZCARD', index.pending) + redis.call('ZCARD', index.leased) == 0
end

-- Calls a command with all items, in parts: Lua passes no more than some thousands at once. Even, so that pairs of score
-- and member stay together.
local items_per_call = 1000
local function call_all(command, key, items)
  for i = 1, #items, items_per_call do
    redis.call(command, key, unpack(items, i, math.min(i + items_per_call - 1, #items)))
  end
end

-- O(ids · log N). `scored` is {score, id, ...}, as ZADD takes it.
-- The removal comes first on purpose: with memory full, Redis refuses a script whose first write needs memory and lets
-- a script go on that has begun. So a transition happens whole or not at all, and those that free memory always do.
local function reindex(from, to, ids, scored)
  call_all('ZREM', index[from], ids)
  call_all('ZADD', index[to], scored)
end

-- {score, id, score, id, ...}, for `reindex`.
local function with_score(score, ids)
  local scored = {}
  for i, id in ipairs(ids) do scored[2 * i - 1], scored[2 * i] = score, id end
  return scored
end

-- O(1). Appends to the journal, and drops entries that are older than what the groups that hold a slot can have
-- written: a group makes five transitions, and two more for each attempt that fails.
local function note(...)
  redis.call('XADD', journal, 'MAXLEN', '~', 1000 + 16 * redis.call('ZCARD', slots), '*', ...)
end

-- O(1). The trailing arguments are the row's fields that change with the state.
local function write_row(id, to, ...)
  redis.call('HSET', row_prefix .. id, 'state', to, ...)
  note('group', id, 'state', to, ...)
end

-- O(1). Counts a reason by its kind: words with a digit in them are all alike. The number of kinds is bounded.
local function count_reason(state, reason)
  local kind = string.gsub(string.gsub(string.sub(reason, 1, 500), '%S*%d%S*', '…'), '%s+', ' ')
  local field = state .. '\0' .. kind
  if redis.call('HLEN', reasons) >= 200 and redis.call('HEXISTS', reasons, field) == 0 then
    field = state .. '\0other reasons'
  end
  redis.call('HINCRBY', reasons, field, 1)
end

-- O(log N). The row of the oldest ended group goes; the totals keep what the accounting needs.
local function compact_oldest()
  local id = redis.call('LPOP', ended)
  local row = redis.call('HMGET', row_prefix .. id, 'state', 'sequence', 'attempt', 'reason')
  local state, sequence, attempt, reason = unpack(row)
  redis.call('UNLINK', row_prefix .. id)
  redis.call('ZREM', index[state], id)
  redis.call('ZREM', line, id)
  redis.call('HINCRBY', totals, state, 1)
  redis.call('HINCRBY', totals, 'sequence_sum', sequence)
  if tonumber(attempt) > 0 then redis.call('HINCRBY', totals, 'retried', 1) end
  if state ~= 'retired' then count_reason(state, reason or '') end
end

-- O(ids · log N). Groups have reached their last state. The latest keep their rows, so that a commit or a give-back that
-- is repeated gets the answer of the first time; older rows become totals.
local function keep_latest(ids)
  call_all('RPUSH', ended, ids)
  local surplus = redis.call('LLEN', ended) - num_ended_kept
  for _ = 1, math.min(surplus, 2 * #ids) do compact_oldest() end
end

-- O(log N). The transition of one group. A script that moves many calls `reindex` once and `write_row` for each.
local function move(id, from, to, score, ...)
  reindex(from, to, {id}, {score, id})
  write_row(id, to, ...)
end

-- O(log N). Whether this lease is the current one and not over.
local function holds(id, state, current_token, token, now)
  if state ~= 'leased' or current_token ~= token then return false end
  return tonumber(redis.call('ZSCORE', deadlines, id)) > now
end

-- A member's lease of a group, as it stands in `holders`.
local function holding(member, id)
  return member .. '\0' .. id
end

local function drop_lease(id, member)
  redis.call('ZREM', deadlines, id)
  redis.call('ZREM', holders, holding(member, id))
end

-- O(log N + leases of the member).
local function leases_of(member, limit)
  local entries = redis.call('ZRANGEBYLEX', holders, '[' .. member .. '\0', '(' .. member .. '\1', 'LIMIT', 0, limit)
  local ids = {}
  for i, entry in ipairs(entries) do ids[i] = string.sub(entry, #member + 2) end
  return ids
end

-- O(1). An error unless this learner took the queue over last. Every learner that does gets a term of its own, so that
-- one that was believed dead, and is not, changes nothing any more.
local function refuse_other_term(term)
  local current = redis.call('HGET', meta, 'learner_term') or '0'
  if current == term then return nil end
  return redis.error_reply('TERM another learner has taken the queue over: its term is ' .. current .. ', not ' .. term)
end

-- O(log N). A group whose payload is gone or too old is generated again, at its old place in the line. It may fail and
-- have to be replaced, so that the ledger is open again.
local function send_back(id, from, sequence, reason)
  local payload = redis.call('HGET', row_prefix .. id, 'payload')
  if payload and payload ~= '' then redis.call('UNLINK', payload) end
  redis.call('HDEL', row_prefix .. id, 'step', 'oldest_version')
  move(id, from, 'pending', sequence, 'reason', reason, 'payload', '', 'num_samples', 0, 'num_tokens', 0)
  redis.call('HDEL', meta, 'closed')
end

-- O(log N). A group that ends without being trained gives back its slot and stops standing in the learner's way.
local function end_group(id, to, sequence, ...)
  move(id, 'leased', to, sequence, ...)
  redis.call('ZREM', slots, id)
  keep_latest({id})
  wake_learner()
end

-- O(log N). A lease that ended without a commit: the group keeps its slot and its place in the line, or FAILS after
-- its last attempt. Returns the new state.
local function end_attempt(id, sequence, attempt, max_attempts, reason)
  if attempt + 1 >= max_attempts then
    end_group(id, 'failed', sequence, 'attempt', attempt + 1, 'reason', reason)
    return 'failed'
  end
  move(id, 'leased', 'pending', sequence, 'attempt', attempt + 1, 'reason', reason)
  return 'pending'
end
