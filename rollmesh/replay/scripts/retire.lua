-- TRAINED → RETIRED, for steps to which no learner will go back. The payloads go now, and the rows later.
-- O(limit · log N + steps).
-- ARGV: last step, limit, prefix of the keys of batches, the learner's term. Returns the number of retired groups.
local through, limit, record_prefix = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local refusal = refuse_other_term(ARGV[5])
if refusal then return refusal end
local trained = redis.call('ZRANGEBYSCORE', index.trained, '-inf', through, 'WITHSCORES', 'LIMIT', 0, limit)
local ids, scored = {}, {}
for i = 1, #trained, 2 do
  local id, step = trained[i], trained[i + 1]
  redis.call('UNLINK', redis.call('HGET', row_prefix .. id, 'payload'))
  ids[#ids + 1] = id
  scored[#scored + 1] = step
  scored[#scored + 1] = id
end
if #ids > 0 then
  reindex('trained', 'retired', ids, scored)
  -- From now on no learner can go back to a step before this one: its groups could not be trained again.
  local gone = math.max(scored[#scored - 1], tonumber(redis.call('HGET', meta, 'payloads_gone_step') or '0'))
  redis.call('HSET', meta, 'payloads_gone_step', gone)
  for _, id in ipairs(ids) do write_row(id, 'retired', 'payload', '') end
  keep_latest(ids)
end
if #ids < limit then
  -- All groups of these steps have retired: the batches of these steps cannot be taken again.
  local batched = redis.call('ZRANGE', index.batched, 0, 0, 'WITHSCORES')[2]
  local last = math.min(through, tonumber(redis.call('HGET', meta, 'taken_step') or '0'))
  if batched then last = math.min(last, tonumber(batched) - 1) end
  local before = tonumber(redis.call('HGET', meta, 'retired_step') or '0')
  for step = before + 1, last do redis.call('UNLINK', record_prefix .. step) end
  if last > before then redis.call('HSET', meta, 'retired_step', last) end
end
return #ids
