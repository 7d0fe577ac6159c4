-- The beginning of every script. KEYS is `Keys.for_scripts`. ARGV[1] is the prefix of the rows; the arguments of the
-- script follow. N is the number of groups that have a row. `scripts.py` defines `num_ended_kept`.
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

-- Wakes the learner. O(1). One element is enough: a learner that pops an element looks at everything.
local function wake_learner()
  if redis.call('EXISTS', wake) == 0 then redis.call('RPUSH', wake, '1') end
end

-- Returns whether no group will become ready any more. O(1).
local function is_all_done()
  return redis.call('HEXISTS', meta, 'closed') == 1
    and redis.call('ZCARD', index.pending) + redis.call('ZCARD', index.leased) == 0
end

-- Calls a command with all items, some items per call: Lua passes only a few thousand arguments at once. The number per
-- call is even, so that each score stays with its member.
local items_per_call = 1000
local function call_all(command, key, items)
  for i = 1, #items, items_per_call do
    redis.call(command, key, unpack(items, i, math.min(i + items_per_call - 1, #items)))
  end
end

-- Moves groups from one state's index to another. O(ids · log N). `scored` is {score, id, score, id, ...}, as for ZADD.
-- The removal comes first on purpose. When memory is full, Redis refuses a script whose first write needs memory, but
-- lets a script finish that has begun to write. So a transition happens whole or not at all, and a transition that
-- begins with a removal always happens.
local function reindex(from, to, ids, scored)
  call_all('ZREM', index[from], ids)
  call_all('ZADD', index[to], scored)
end

-- Returns {score, id, score, id, ...}, for `reindex`.
local function with_score(score, ids)
  local scored = {}
  for i, id in ipairs(ids) do scored[2 * i - 1], scored[2 * i] = score, id end
  return scored
end

-- Appends an entry to the journal, and drops old entries. O(1). The journal keeps more entries than the groups that
-- hold a slot can have written: a group makes five transitions, and two more for each attempt that fails.
local function note(...)
  redis.call('XADD', journal, 'MAXLEN', '~', 1000 + 16 * redis.call('ZCARD', slots), '*', ...)
end

-- Writes the new state of a group into its row and the journal. O(1). The further arguments are other fields that
-- change.
local function write_row(id, to, ...)
  redis.call('HSET', row_prefix .. id, 'state', to, ...)
  note('group', id, 'state', to, ...)
end

-- Counts a reason by its kind, for which all words with a digit are alike. O(1). The number of kinds is bounded.
local function count_reason(state, reason)
  local kind = string.gsub(string.gsub(string.sub(reason, 1, 500), '%S*%d%S*', '…'), '%s+', ' ')
  local field = state .. '\0' .. kind
  if redis.call('HLEN', reasons) >= 200 and redis.call('HEXISTS', reasons, field) == 0 then
    field = state .. '\0other reasons'
  end
  redis.call('HINCRBY', reasons, field, 1)
end

-- Removes the row of the group that ended first, and adds to the totals what the accounting needs. O(log N).
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

-- Notes that groups have ended. O(ids · log N). The groups that ended last keep their rows, so that a repeated commit
-- or give-back gets its first answer. Older rows become totals.
local function keep_latest(ids)
  call_all('RPUSH', ended, ids)
  local surplus = redis.call('LLEN', ended) - num_ended_kept
  for _ = 1, math.min(surplus, 2 * #ids) do compact_oldest() end
end

-- Makes the transition of one group. O(log N). A script that moves many groups calls `reindex` once, and `write_row`
-- for each group.
local function move(id, from, to, score, ...)
  reindex(from, to, {id}, {score, id})
  write_row(id, to, ...)
end

-- Returns whether a lease is the current lease of its group and not over. O(log N).
local function holds(id, state, current_token, token, now)
  if state ~= 'leased' or current_token ~= token then return false end
  return tonumber(redis.call('ZSCORE', deadlines, id)) > now
end

-- Returns the entry in `holders` for a member's lease of a group.
local function holding(member, id)
  return member .. '\0' .. id
end

-- Removes a lease from both lists of leases. O(log N).
local function drop_lease(id, member)
  redis.call('ZREM', deadlines, id)
  redis.call('ZREM', holders, holding(member, id))
end

-- Returns the ids of the groups that a member holds, `limit` of them at most (-1: all). O(log N + leases of the
-- member).
local function leases_of(member, limit)
  local entries = redis.call('ZRANGEBYLEX', holders, '[' .. member .. '\0', '(' .. member .. '\1', 'LIMIT', 0, limit)
  local ids = {}
  for i, entry in ipairs(entries) do ids[i] = string.sub(entry, #member + 2) end
  return ids
end

-- Returns an error unless the learner with this term was the last to take the queue over. O(1). Each learner that takes
-- the queue over gets a new term. A former learner that was believed dead, and lives, can therefore change nothing.
local function refuse_other_term(term)
  local current = redis.call('HGET', meta, 'learner_term') or '0'
  if current == term then return nil end
  return redis.error_reply('TERM another learner has taken the queue over: its term is ' .. current .. ', not ' .. term)
end

-- Sends a group whose payload is gone or too old back to be generated again, at its old place in the line. O(log N).
-- The group may fail and need a replacement; therefore the ledger is open again.
local function send_back(id, from, sequence, reason)
  local payload = redis.call('HGET', row_prefix .. id, 'payload')
  if payload and payload ~= '' then redis.call('UNLINK', payload) end
  redis.call('HDEL', row_prefix .. id, 'step', 'oldest_version')
  move(id, from, 'pending', sequence, 'reason', reason, 'payload', '', 'num_samples', 0, 'num_tokens', 0)
  redis.call('HDEL', meta, 'closed')
end

-- Ends a group that will not be trained: the group gives back its slot, and the learner no longer waits for it. O(log
-- N).
local function end_group(id, to, sequence, ...)
  move(id, 'leased', to, sequence, ...)
  redis.call('ZREM', slots, id)
  keep_latest({id})
  wake_learner()
end

-- Ends a lease without a commit, and returns the new state of the group. O(log N). The group is PENDING again, with its
-- slot and its place in the line; after its last attempt the group is FAILED.
local function end_attempt(id, sequence, attempt, max_attempts, reason)
  if attempt + 1 >= max_attempts then
    end_group(id, 'failed', sequence, 'attempt', attempt + 1, 'reason', reason)
    return 'failed'
  end
  move(id, 'leased', 'pending', sequence, 'attempt', attempt + 1, 'reason', reason)
  return 'pending'
end
