-- Closes the ledger: no group will be opened any more, and the learner may take a last, smaller batch. O(1).
if redis.call('HSETNX', meta, 'closed', '1') == 1 then note('ledger', 'closed') end
wake_learner()
return 1
