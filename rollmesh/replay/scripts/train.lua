-- BATCHED → TRAINED, for the batch of one step. O(size · log N). ARGV: key of the step's record, step, the
-- learner's term.
-- The groups keep their slots. The slot's score is now the step, whose version frees the slot once it is committed.
-- Returns the size of the batch.
local record, step = ARGV[2], ARGV[3]
local refusal = refuse_other_term(ARGV[4])
if refusal then return refusal end
local ids = redis.call('ZRANGEBYSCORE', index.batched, step, step)
reindex('batched', 'trained', ids, with_score(step, ids))
for _, id in ipairs(ids) do
  write_row(id, 'trained')
  redis.call('ZADD', slots, 'XX', step, id)
end
if #ids > 0 then redis.call('HINCRBY', meta, 'num_steps', 1) end
return redis.call('LLEN', record)
