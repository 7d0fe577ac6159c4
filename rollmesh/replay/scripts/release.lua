-- Frees the slots of the groups that the steps up to a step trained. O(log N + slots).
-- ARGV: the step. Returns the number of freed slots.
return redis.call('ZREMRANGEBYSCORE', slots, '-inf', ARGV[2])
