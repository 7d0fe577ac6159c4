"""The ledger and the replay queue, on Redis: the way of a group from prompt to durable checkpoint.

::

    coordinator ── open_groups, lease, expire, release ──┐
    rollout     ── commit | give_back | filter ──────────┤   Redis
                                                         ├── row:<group>      state, attempt, token, reason, ...
    learner     ── take_batch, payloads ─────────────────┤   payload:<group>  msgpack, from commit to retirement
                ── mark_trained, retire ─────────────────┘   indexes, slots, journal, wake-up

One row per group is the truth. `Ledger` (asyncio) and `BatchQueue` (blocking) move rows by one Lua script per
transition, which compares the state and the fencing token, writes the row, appends to the journal and wakes the
learner; payloads never pass through Lua. The learner is the only one who blocks: it waits for commits, for ends of
groups in its way and for the closing of the ledger. `keys` is the only place that spells a key.

Every call may be applied twice (the client repeats it after a broken connection) without harm.

Modules: `staleness` (the window and its bound), `ledger`, `intake`, `rows`, `accounting` (where every group ended),
`codec` (payloads), `keys`, `scripts`, `connection`, `server` (a Redis of our own). This package imports nothing by
itself, so that the Redis client stays optional.
"""
