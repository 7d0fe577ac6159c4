-- READY → BATCHED, a whole batch or nothing. O(size · log N); O(1) while too few groups are ready.
-- ARGV: key of the step's record, step, size, window, the learner's term, its lineage, and the lowest version number
-- that it may train a group of an older lineage on. A step that has its batch gets it again.
-- The rule: take the ready group of lowest sequence, again and again, while it lies inside the window that begins at
-- the oldest live group (pending, leased or ready). Ready groups before the first one still being worked on are the
-- oldest themselves; so all `size` lowest may go exactly if the last of them lies in the window that begins there.
-- A step that was retired is refused: its groups are gone, and others must not take their place.
-- Returns {'batch', 1 if it is the last, row, ...}, {'wait'}, or {'end'} where nothing will come any more.
local record, step, size, window = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])

local term, lineage, lowest_number = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local refusal = refuse_other_term(term)
if refusal then return refusal end

local function answer(ids)
  local is_last = redis.call('HGET', meta, 'last_step') == step
  local reply = {'batch', is_last and 1 or 0}
  for _, id in ipairs(ids) do reply[#reply + 1] = read_row(id) end
  return reply
end

local recorded = redis.call('LRANGE', record, 0, -1)
if #recorded > 0 then return answer(recorded) end

local retired = tonumber(redis.call('HGET', meta, 'retired_step') or '0')
if tonumber(step) <= retired then
  return redis.error_reply('RETIRED the groups of step ' .. step .. ' are retired and cannot be taken again')
end

-- For commits, which need not wake the learner for less. May fail with memory full, where commits fail as well.
if redis.call('HGET', meta, 'batch_size') ~= ARGV[4] then redis.pcall('HSET', meta, 'batch_size', ARGV[4]) end

-- A learner that went back to a checkpoint meets groups of the lineage that it left. Groups that are older than the
-- bound allows are generated again. Within one lineage the number of slots keeps the bound, and the learner checks it.
if lineage > 0 then
  local is_any_too_old = false
  local first = redis.call('ZRANGE', index.ready, 0, size - 1, 'WITHSCORES')
  for i = 1, #first, 2 do
    local version = redis.call('HGET', row_prefix .. first[i], 'oldest_version')
    local of_lineage, number = string.match(version, '^(%d+)%.(%d+)$')
    if tonumber(of_lineage) < lineage and tonumber(number) < lowest_number then
      send_back(first[i], 'ready', first[i + 1], 'too old after a resume: ' .. version)
      is_any_too_old = true
    end
  end
  if is_any_too_old then return {'wait'} end
end

local num_ready = redis.call('ZCARD', index.ready)
local is_all = is_all_done()
if is_all and num_ready == 0 then return {'end'} end
if not is_all and num_ready < size then return {'wait'} end

local picked = redis.call('ZRANGE', index.ready, 0, size - 1, 'WITHSCORES')
local last = tonumber(picked[#picked])
for _, state in ipairs({'pending', 'leased'}) do
  local oldest = redis.call('ZRANGE', index[state], 0, 0, 'WITHSCORES')[2]
  if oldest and last >= tonumber(oldest) + window then return {'wait'} end
end

local ids = {}
for i = 1, #picked, 2 do ids[#ids + 1] = picked[i] end
reindex('ready', 'batched', ids, with_score(step, ids))
call_all('RPUSH', record, ids)
for _, id in ipairs(ids) do write_row(id, 'batched', 'step', step) end
redis.call('HSET', meta, 'taken_step', step)
if is_all and num_ready <= size then redis.call('HSET', meta, 'last_step', step) end
return answer(ids)
