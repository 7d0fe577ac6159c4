"""The ledger and the replay queue, on Redis: the way of a group from prompt to durable checkpoint.

::

    coordinator ── open_groups, lease, expire, release ──┐
    rollout     ── commit | give_back | filter ──────────┤   Redis
                                                         ├── row:<group>      state, attempt, token, reason, ...
    learner     ── take_batch, payloads ─────────────────┤   payload:<group>  msgpack, from commit to retirement
                ── mark_trained, retire ─────────────────┘   indexes, slots, journal, wake-up

Each group has one row, and the row alone says where the group is. `Ledger` (asyncio) and `BatchQueue` (blocking) move
rows. Each transition is one Lua script: the script compares the state and the fencing token, writes the row, appends to
the journal and wakes the learner. Payloads never pass through Lua. Only the learner blocks: the learner waits for
commits, for the end of groups that stand before a batch, and for the closing of the ledger. Only `keys` spells keys.

The client repeats a call after a broken connection. Redis may therefore apply a call twice; that does no harm.

Modules: `staleness` (the window and its bound), `ledger`, `batches` (the learner's side), `commits`, `rows`,
`accounting` (where every group ended), `codec` and `header` (payloads), `recording` (batches as files, with which a run
is repeated), `keys`, `scripts`, `connection`, `memory`, `identity` and `claim` (whose keys these are), `embedded` (a
Redis of the run's own). The package's `__init__` imports nothing, so that the Redis client stays optional.
"""
