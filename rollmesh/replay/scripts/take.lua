-- READY → BATCHED, a whole batch or nothing. O(size · log N); O(1) while too few groups are ready.
-- ARGV: key of the step's batch, step, size, window, the learner's term, the learner's lineage, and the lowest version
-- number of a group of an older lineage that the learner may train on. A step that has its batch gets the batch again.
-- The rule: again and again, take the ready group of lowest sequence, as long as the group lies in the window that
-- begins at the oldest live group (pending, leased or ready). A ready group that stands before all pending and leased
-- groups is itself the oldest live group, so that the window begins at the first pending or leased group. Therefore the
-- `size` lowest ready groups may go exactly if the last of them lies in the window that begins at that group.
-- A step that was retired is refused: its groups are gone, and other groups must not take their place.
-- Returns {'batch', 1 if the batch is the last, row, ...}, {'wait'}, or {'end'} if no group will come any more.
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

-- Commits wake the learner only once this many groups are ready. The write may fail when memory is full; then commits
-- fail as well.
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
