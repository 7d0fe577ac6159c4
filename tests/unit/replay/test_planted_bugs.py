"""The random schedules find bugs: each of these, planted into one script, makes a schedule fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from rollmesh.replay import batches, coordinator_ledger, ledger, scripts
from rollmesh.types import Group
from tests.unit.replay.test_ledger_properties import Schedule

NUM_SEEDS = 12
"""Schedules that a bug may slip through before it has to be found."""


class Bug(NamedTuple):
    """``wrong`` stands in place of ``right`` in a script, or in what all scripts begin with."""

    script: str
    right: str
    wrong: str


BUGS = {
    "a prompt is opened twice": Bug("open", "not has_row and not (first >= 0 and first + i - 4 < num_opened)", "true"),
    "more groups are opened than there are slots": Bug("open", "redis.call('ZCARD', slots) < num_slots", "true"),
    "the last in the line is leased first": Bug("lease", "'ZRANGE', index.pending", "'ZREVRANGE', index.pending"),
    "two leases have one token": Bug("lease", "redis.call('HINCRBY', meta, 'token', 1)", "7"),
    "groups far behind are leased after a take-over": Bug("lease", "num_before(sequence) >= num_slots", "false"),
    "a lease that is over commits": Bug(
        "commit",
        "not holds(id, state, current_token, token, now)",
        "state ~= 'leased'",
    ),
    "a repeated commit is refused": Bug("commit", "state == 'ready' or state == 'batched'", "state == 'batched'"),
    "a lease that expired is still held": Bug("expire", "drop_lease(id, holder)", ""),
    "an attempt that failed is not counted": Bug(
        "",
        "'pending', sequence, 'attempt', attempt + 1",
        "'pending', sequence, 'attempt', attempt",
    ),
    "a repeated give-back is refused": Bug("give_back", "if returned == token then return state end", ""),
    "an ended group keeps its slot": Bug("", "redis.call('ZREM', slots, id)", ""),
    "the window is ignored": Bug("take", "tonumber(oldest) + window", "tonumber(oldest) + 1000"),
    "a step forgets its batch": Bug("take", "call_all('RPUSH', record, ids)", ""),
    "the last batch is not known as the last": Bug("take", "is_all and num_ready <= size", "false"),
    "samples that are too old are trained": Bug("take", "tonumber(number) < lowest_number", "false"),
    "a trained group keeps its slot": Bug("train", "redis.call('ZADD', slots, 'XX', step, id)", ""),
    "a retired group keeps its payload": Bug(
        "retire",
        "redis.call('UNLINK', redis.call('HGET', row_prefix .. id, 'payload'))",
        "",
    ),
    "a retired step is taken again": Bug("retire", "redis.call('HSET', meta, 'retired_step', last)", ""),
    "a learner that was replaced goes on": Bug("", "if current == term then return nil end", "do return nil end"),
    "a group that is trained again has no slot": Bug("take_over", "redis.call('ZADD', slots, '+inf', id)", ""),
    "a step that is trained again finds its old batch": Bug(
        "take_over",
        "redis.call('UNLINK', record_prefix .. later)",
        "",
    ),
    "a group that is trained again keeps its step": Bug(
        "take_over",
        "redis.call('HDEL', row_prefix .. id, 'step')",
        "",
    ),
    "a closed ledger stays open": Bug("close", "redis.call('HSETNX', meta, 'closed', '1') == 1", "false"),
    "a newer version is not remembered": Bug("version", "if known ~= version then", "if not known then"),
    "an older coordinator is heard": Bug("fence", "if current ~= term then", "if false then"),
    "slots are never released": Bug("release", "'ZREMRANGEBYSCORE', slots, '-inf', ARGV[2]", "'ZCARD', slots"),
    "the totals count a group twice": Bug(
        "",
        "redis.call('HINCRBY', totals, state, 1)",
        "redis.call('HINCRBY', totals, state, 2)",
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))
def test_a_planted_bug_is_found(
    url: str, run_id: str, make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch, bug: Bug
) -> None:
    def source(name: str) -> str:
        text = scripts.source(name)
        if bug.script not in ("", *name.split("/")):
            return text
        assert bug.right in text, "the script no longer holds what the bug replaces"
        return text.replace(bug.right, bug.wrong)

    scripts.source.cache_clear()
    monkeypatch.setattr(scripts, "NUM_ENDED_KEPT", 3)
    for module in (ledger, coordinator_ledger, batches):
        monkeypatch.setattr(module, "source", source)
    try:
        assert any(fails(url, f"{run_id}-{seed}", make_group, seed) for seed in range(NUM_SEEDS))
    finally:
        scripts.source.cache_clear()


def fails(url: str, run_id: str, make_group: Callable[..., Group], seed: int) -> bool:
    """Whether the schedule of a seed fails, in whatever way."""
    schedule = Schedule(url, run_id, make_group, seed)
    try:
        schedule.run(num_actions=200)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - a broken script may break anything
        return True
    finally:
        schedule.close_clients()
    return False
