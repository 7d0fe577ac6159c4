"""Random schedules against a slow model: opening, leasing, expiry, late and repeated calls, batches, retirement."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from rollmesh.errors import DeadlineError, ReplayError, SupersededError
from rollmesh.replay import scripts
from rollmesh.replay.accounting import account
from rollmesh.replay.batches import Batch, BatchQueue
from rollmesh.replay.claim import RunClaim
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.identity import RunIdentity
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import RecordedVersion
from rollmesh.replay.staleness import StalenessWindow
from rollmesh.types import Group, GroupState, PolicyVersion, PromptId

S = GroupState
LIVE = (S.PENDING, S.LEASED, S.READY)
MAX_ATTEMPTS = 3
BOUNDS = StalenessWindow(max_staleness=2, num_slots=6, groups_per_batch=2)
NUM_SLOTS, BATCH_SIZE, WINDOW = BOUNDS.num_slots, BOUNDS.groups_per_batch, BOUNDS.size
FIRST_VERSION = PolicyVersion(0, 0)
MEMBERS = ("rollout-0", "rollout-1", "rollout-2")
FEW_SCHEDULES = 6
NUM_SCHEDULES = int(os.environ.get("LEDGER_SCHEDULES", FEW_SCHEDULES))
"""Each schedule runs twice, see `num_ended_kept`. `make schedules` runs many."""


@dataclass
class ModelGroup:
    """What the model knows of a group; a commit writes ``payload_token``, the end of the lease ``is_overdue``."""

    state: GroupState = S.PENDING
    attempt: int = 0
    token: int = 0
    member: str = ""
    is_overdue: bool = False
    returned_token: int | None = None
    payload_token: int | None = None
    leased_version: PolicyVersion = FIRST_VERSION
    oldest_version: PolicyVersion | None = None
    step: int | None = None
    has_slot: bool = True


@dataclass
class Model:
    """The ledger as one would write it down without caring how long it takes."""

    groups: list[ModelGroup] = field(default_factory=list)
    batches: dict[int, list[int]] = field(default_factory=dict)
    last_token: int = 0
    is_closed: bool = False

    def holds(self, sequence: int, token: int) -> bool:
        group = self.groups[sequence]
        return group.state is S.LEASED and group.token == token and not group.is_overdue

    def end_attempt(self, group: ModelGroup, max_attempts: int) -> None:
        group.attempt += 1
        if group.attempt >= max_attempts:
            self.end(group, S.FAILED)
        else:
            group.state = S.PENDING

    def end(self, group: ModelGroup, state: GroupState) -> None:
        group.state, group.has_slot = state, False

    def num_before(self, sequence: int) -> int:
        """Groups that hold a slot and stand before a place in the line, or were taken into a batch."""
        return sum(
            group.has_slot and (place < sequence or group.state in (S.BATCHED, S.TRAINED, S.RETIRED))
            for place, group in enumerate(self.groups)
        )

    def leasable(self, limit: int) -> list[int]:
        pending = [i for i, group in enumerate(self.groups) if group.state is S.PENDING]
        return [i for i in pending if self.num_before(i) < NUM_SLOTS][:limit]

    def send_back_too_old(self, version: PolicyVersion) -> bool:
        """What a batch would begin with, and an older lineage made too long ago, is generated again."""
        first = [group for group in self.groups if group.state is S.READY][:BATCH_SIZE]
        old = [group for group in first if is_too_old(group.oldest_version, version)]
        for group in old:
            group.state, group.payload_token, group.oldest_version = S.PENDING, None, None
            self.is_closed = False
        return bool(old)

    def pick(self) -> list[int] | None:
        """The rule as it is stated: one group after the other, the window anchored anew each time."""
        left = [i for i, group in enumerate(self.groups) if group.state in LIVE]
        if self.is_closed and all(self.groups[i].state is S.READY for i in left) and len(left) < BATCH_SIZE:
            return left
        picked: list[int] = []
        while len(picked) < BATCH_SIZE:
            allowed = [i for i in left if self.groups[i].state is S.READY and i < left[0] + WINDOW]
            if not allowed:
                return None
            picked.append(allowed[0])
            left.remove(allowed[0])
        return picked


def is_too_old(oldest: PolicyVersion | None, version: PolicyVersion) -> bool:
    assert oldest is not None
    return oldest.lineage < version.lineage and version.number - oldest.number > BOUNDS.bound


class Schedule:
    """A run of random actions, each applied to the ledger and to the model, which are compared after each."""

    def __init__(self, url: str, run_id: str, make_group: Callable[..., Group], seed: int) -> None:
        self.num_ended_kept = scripts.NUM_ENDED_KEPT
        self.random = random.Random(seed)
        self.runner = asyncio.Runner()
        self.client = connect(url, 5.0)
        self.run_id, self.keys = run_id, Keys(run_id)
        self.claim = RunClaim(self.client, run_id, RunIdentity("id", "fingerprint"), "Redis", 30.0)
        self.formers: list[CoordinatorLedger] = []
        self.ledger = self.new_coordinator()
        self.raw: redis.Redis = connect_blocking(url, 5.0)
        self.queue = BatchQueue(self.raw, run_id)
        self.make_group = make_group
        self.model = Model()
        self.leases: list[tuple[int, int]] = []
        self.step = 1
        self.num_marked = 0
        self.num_retired = 0
        self.retired_step = 0
        self.without_row: set[int] = set()
        self.version = PolicyVersion(0, 0)
        self.committed = PolicyVersion(0, 0)
        self.saved_step, self.saved_version = 0, PolicyVersion(0, 0)
        self.has_gone_back = False
        self.num_trained_again = 0
        self.queue.take_over(0)

    def run(self, num_actions: int) -> None:
        actions: dict[Callable[[], None], int] = {
            self.open: 8,
            self.lease: 10,
            self.time_is_up: 2,
            self.sweep: 2,
            self.lose_member: 1,
            self.replace_coordinator: 2,
            self.wake_former_coordinator: 4,
            self.commit: 20,
            self.end_otherwise: 2,
            self.take: 12,
            self.mark_trained: 8,
            self.commit_version: 6,
            self.save: 2,
            self.retire: 2,
            self.go_back: 3,
        }
        for number in range(num_actions):
            if number == num_actions * 3 // 4:
                self.close()
            (action,) = self.random.choices(list(actions), weights=list(actions.values()))
            action()
            self.check()
        self.finish()

    def finish(self) -> None:
        """Whatever has happened, the run can be brought to its end, and everything is accounted for there."""
        for _ in range(10 * NUM_SLOTS):
            self.close()
            for action in (self.sweep, self.lease, self.commit, self.commit, self.take):
                action()
            self.mark_trained()
            self.commit_version()
            self.check()
        self.save()
        self.retire()
        self.check()
        assert self.queue.take_batch(self.step, BATCH_SIZE, WINDOW, timeout_s=0) is None
        assert {group.state for group in self.model.groups} <= {S.RETIRED, S.FAILED, S.FILTERED}
        assert self.raw.zcard(self.keys.slots) == 0

    def close_clients(self) -> None:
        self.runner.run(self.client.aclose())
        self.raw.close()
        self.runner.close()

    def any_lease(self) -> tuple[int, int]:
        """A lease that somebody has or had: mostly a current one."""
        current = [(i, token) for i, token in self.leases if self.model.holds(i, token)]
        return self.random.choice(current if current and self.random.random() < 0.7 else self.leases)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.runner.run(getattr(self.ledger, method)(*args, **kwargs))

    def prompt(self, sequence: int) -> PromptId:
        return PromptId("train", 0, sequence)

    # Coordinator.

    def new_coordinator(self) -> CoordinatorLedger:
        term = self.runner.run(self.claim.take()).term
        return CoordinatorLedger(self.client, self.run_id, max_attempts=MAX_ATTEMPTS, term=term)

    def replace_coordinator(self) -> None:
        """The coordinator dies or seems to; another one goes on with the run."""
        self.formers.append(self.ledger)
        self.ledger = self.new_coordinator()

    def wake_former_coordinator(self) -> None:
        """A coordinator that seemed dead makes a call late, or once more."""
        if not self.formers:
            return
        former, number = self.random.choice(self.formers), len(self.model.groups)
        version = PolicyVersion(self.version.lineage, self.version.number + 1)
        lease = self.any_lease() if self.leases else (0, 0)
        key = str(self.prompt(lease[0])), lease[1]
        calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: former.open_groups([self.prompt(number)], NUM_SLOTS, number),
            lambda: former.lease(self.random.choice(MEMBERS), 3600.0, 3, NUM_SLOTS),
            lambda: former.renew([key], 3600.0),
            lambda: former.expire_leases(),
            lambda: former.revoke_member(self.random.choice(MEMBERS)),
            lambda: former.give_back(*key, "late"),
            lambda: former.close(),
            lambda: former.record_version(version, self.step),
            lambda: former.release_slots(10**6),
        ]
        with pytest.raises(SupersededError, match="has taken over"):
            self.runner.run(self.random.choice(calls)())

    def open(self) -> None:
        if self.model.is_closed:
            return
        count = self.random.randint(1, 4)
        start = max(0, len(self.model.groups) - 1)  # the last one again, as after a lost answer
        self.call("open_groups", [self.prompt(i) for i in range(start, start + count)], NUM_SLOTS, start)
        while len(self.model.groups) < start + count and sum(g.has_slot for g in self.model.groups) < NUM_SLOTS:
            self.model.groups.append(ModelGroup())

    def lease(self) -> None:
        member, limit = self.random.choice(MEMBERS), self.random.randint(1, 3)
        rows = self.call("lease", member, 3600.0, limit, NUM_SLOTS)
        expected = self.model.leasable(limit)
        assert [row.sequence for row in rows] == expected
        for row in rows:
            group = self.model.groups[row.sequence]
            assert row.prompt_id == self.prompt(row.sequence)
            assert row.fencing_token > self.model.last_token
            self.model.last_token = row.fencing_token
            group.state, group.member, group.token = S.LEASED, member, row.fencing_token
            group.returned_token, group.leased_version = None, self.committed
            self.leases.append((row.sequence, row.fencing_token))

    def time_is_up(self) -> None:
        if not self.leases:
            return
        sequence, token = self.any_lease()
        if self.model.holds(sequence, token):
            self.raw.zadd(self.keys.deadlines, {str(self.prompt(sequence)): 1}, xx=True)
            self.model.groups[sequence].is_overdue = True

    def sweep(self) -> None:
        ended = [i for i, group in enumerate(self.model.groups) if group.state is S.LEASED and group.is_overdue]
        self.end_leases(ended, self.call("expire_leases"))

    def lose_member(self) -> None:
        member = self.random.choice(MEMBERS)
        ended = [i for i, g in enumerate(self.model.groups) if g.state is S.LEASED and g.member == member]
        self.end_leases(ended, self.call("revoke_member", member))

    def end_leases(self, ended: list[int], rows: list[Any]) -> None:
        assert sorted(row.sequence for row in rows) == ended
        for sequence in ended:
            self.model.groups[sequence].is_overdue = False
            self.model.end_attempt(self.model.groups[sequence], MAX_ATTEMPTS)

    def close(self) -> None:
        self.call("close")
        self.model.is_closed = True

    def commit_version(self) -> None:
        self.call("record_version", self.version, self.num_marked)
        assert self.call("newest_version") == RecordedVersion(self.version, self.num_marked)
        self.call("release_slots", self.num_marked)
        self.committed = self.version
        for group in self.model.groups:
            if group.state in (S.TRAINED, S.RETIRED):
                group.has_slot = False

    # Workers, with any lease they ever had.

    def commit(self) -> None:
        if not self.leases:
            return
        sequence, token = self.any_lease()
        group = self.model.groups[sequence]
        if self.model.holds(sequence, token):
            expected = "accepted"
            group.state, group.payload_token, group.oldest_version = S.READY, token, group.leased_version
        else:
            is_known = sequence not in self.without_row
            is_done = group.payload_token == token or self.is_retired(group, token)
            expected = "duplicate" if is_known and is_done else "fenced"
        made = self.make_group(self.prompt(sequence), sequence, version=group.leased_version)
        outcome = self.call("commit", made, token)
        assert outcome.value == expected

    def is_retired(self, group: ModelGroup, token: int) -> bool:
        return group.state is S.RETIRED and group.token == token

    def end_otherwise(self) -> None:
        if not self.leases:
            return
        sequence, token = self.any_lease()
        kind = self.random.choice(["back", "back", "back", "final", "filter"])
        group = self.model.groups[sequence]
        expected = None
        if sequence in self.without_row:
            expected = None
        elif group.returned_token == token:
            expected = group.state
        elif self.model.holds(sequence, token):
            if kind == "filter":
                self.model.end(group, S.FILTERED)
            else:
                self.model.end_attempt(group, MAX_ATTEMPTS if kind == "back" else 0)
            group.returned_token = token
            expected = group.state
        if kind == "filter":
            answer = self.call("filter_group", str(self.prompt(sequence)), token, "why")
        else:
            args = (str(self.prompt(sequence)), token, "why")
            answer = self.call("give_back", *args, is_final=kind == "final")
        assert answer is expected

    # Learner.

    def take(self) -> None:
        is_repeated = self.random.random() < 0.2
        step = self.step - 1 if is_repeated and self.step > 1 else self.step
        if step <= self.retired_step:
            with pytest.raises(ReplayError, match=f"step {step} are retired and cannot be taken again"):
                self.take_batch(step)
            return
        expected = self.model.batches.get(step)
        if expected is None and not self.model.send_back_too_old(self.version):
            expected = self.model.pick()
        try:
            batch = self.take_batch(step)
        except DeadlineError:
            assert expected is None
            return
        if not expected:
            assert expected == []
            assert batch is None
            return
        assert batch is not None
        assert [row.sequence for row in batch.rows] == expected
        if step < self.step:
            return
        self.no_sample_is_older_than_the_bound(batch)
        self.model.batches[step] = expected
        for sequence in expected:
            self.model.groups[sequence].state, self.model.groups[sequence].step = S.BATCHED, step
        self.step += 1
        is_all = not any(group.state in LIVE for group in self.model.groups)
        assert batch.is_last == (self.model.is_closed and is_all)

    def take_batch(self, step: int) -> Batch | None:
        lowest = self.version.number - BOUNDS.bound
        return self.queue.take_batch(step, BATCH_SIZE, WINDOW, 0, self.version.lineage, lowest)

    def no_sample_is_older_than_the_bound(self, batch: Batch) -> None:
        ages = [self.version.number - row.oldest_version.number for row in batch.rows]
        assert max(ages) <= BOUNDS.bound
        assert min(ages) >= 0

    def mark_trained(self) -> None:
        if self.num_marked == self.step - 1:
            return
        self.num_marked += 1
        for _ in range(2):
            assert self.queue.mark_trained(self.num_marked) == len(self.model.batches[self.num_marked])
        for sequence in self.model.batches[self.num_marked]:
            self.model.groups[sequence].state = S.TRAINED
        self.version = self.version.next()

    def save(self) -> None:
        """A checkpoint of the policy as it is becomes durable."""
        self.saved_step, self.saved_version = self.num_marked, self.version

    def retire(self) -> None:
        covered = [i for step in range(1, self.saved_step + 1) for i in self.model.batches.get(step, [])]
        retired = [self.model.groups[i] for i in covered if self.model.groups[i].state is S.TRAINED]
        assert self.queue.retire(self.saved_step) == len(retired)
        for group in retired:
            group.state, group.payload_token = S.RETIRED, None
        self.num_retired += len(retired)
        self.retired_step = max(self.retired_step, self.saved_step)

    def go_back(self) -> None:
        """The learner dies. Another one takes over from the last checkpoint and publishes what it has."""
        former, self.queue = self.queue, BatchQueue(self.raw, self.run_id)
        step, num_marked = self.saved_step, self.num_marked
        later = [i for number, batch in self.model.batches.items() if number > step for i in batch]
        taken_over = self.queue.take_over(step)
        assert taken_over == (len(later), 0)
        assert self.queue.take_over(step) == (0, 0)
        for call in (lambda: former.take_batch(step + 1, 1, 1, 0), lambda: former.mark_trained(step + 1)):
            with pytest.raises(SupersededError, match="another learner has taken the queue over"):
                call()
        with pytest.raises(SupersededError):
            former.retire(num_marked)
        for sequence in later:
            group = self.model.groups[sequence]
            group.state, group.step, group.has_slot = S.READY, None, True
        self.model.batches = {number: batch for number, batch in self.model.batches.items() if number <= step}
        self.model.is_closed = False
        self.step, self.num_marked = step + 1, step
        self.has_gone_back |= bool(later)
        self.num_trained_again += len(later)
        if self.saved_version < self.committed:
            self.saved_version = PolicyVersion(self.committed.lineage + 1, self.committed.number + 1)
        self.version = self.saved_version
        self.commit_version()

    # What must hold after every action.

    def check(self) -> None:
        self.rows_are_those_of_the_model()
        self.only_the_groups_that_ended_long_ago_have_no_row()
        self.counts_are_those_of_the_rows()
        self.slots_are_never_exceeded()
        self.no_group_is_in_two_batches()
        self.payloads_are_there_from_commit_to_retirement_and_nothing_else()
        self.leases_are_indexed_exactly()

    def rows_are_those_of_the_model(self) -> None:
        async def all_rows() -> list[Any]:
            return [row async for row in self.ledger.rows()]

        rows = self.runner.run(all_rows())
        self.without_row = set(range(len(self.model.groups))) - {row.sequence for row in rows}
        groups = [(i, group) for i, group in enumerate(self.model.groups) if i not in self.without_row]
        assert [(row.sequence, row.state, row.attempt, row.fencing_token, row.step) for row in rows] == [
            (i, group.state, group.attempt, group.token, group.step) for i, group in groups
        ]
        assert all(row.reason for row in rows if row.state in (S.FAILED, S.FILTERED))

    def only_the_groups_that_ended_long_ago_have_no_row(self) -> None:
        ended = [i for i, group in enumerate(self.model.groups) if group.state in (S.RETIRED, S.FAILED, S.FILTERED)]
        assert self.without_row <= set(ended)
        assert len(self.without_row) == max(0, len(ended) - self.num_ended_kept)
        books = self.runner.run(account(self.ledger))
        groups = self.model.groups
        assert books["num_opened"] == len(groups)
        assert books["num_groups"] == {state.value: sum(group.state is state for group in groups) for state in S}
        assert books["num_retried"] == sum(group.attempt > 0 for group in groups)
        assert books["num_steps"] == self.num_marked
        assert sum(books["reasons"].values()) == sum(group.state in (S.FAILED, S.FILTERED) for group in groups)
        assert books["is_balanced"] == (len(ended) + books["num_groups"]["trained"] == len(groups))

    def counts_are_those_of_the_rows(self) -> None:
        snapshot = self.call("snapshot")
        for state in S:
            assert snapshot.num_groups[state] == sum(group.state is state for group in self.model.groups)
        assert snapshot.num_slots_used == sum(group.has_slot for group in self.model.groups)

    def slots_are_never_exceeded(self) -> None:
        if not self.has_gone_back:
            assert self.raw.zcard(self.keys.slots) <= NUM_SLOTS

    def no_group_is_in_two_batches(self) -> None:
        taken = [sequence for batch in self.model.batches.values() for sequence in batch]
        assert len(taken) == len(set(taken))

    def payloads_are_there_from_commit_to_retirement_and_nothing_else(self) -> None:
        pipeline = self.raw.pipeline(transaction=False)
        for sequence, token in self.leases:
            pipeline.ttl(self.keys.payload(str(self.prompt(sequence)), token))
        for_ever, absent = -1, -2
        assert pipeline.execute() == [
            for_ever if self.model.groups[sequence].payload_token == token else absent
            for sequence, token in self.leases
        ]

    def leases_are_indexed_exactly(self) -> None:
        leased = {str(self.prompt(i)) for i, group in enumerate(self.model.groups) if group.state is S.LEASED}
        deadlines: Any = self.raw.zrange(self.keys.deadlines, 0, -1)
        holders: Any = self.raw.zrange(self.keys.holders, 0, -1)
        assert {key.decode() for key in deadlines} == leased
        assert {key.decode().split("\0")[1] for key in holders} == leased


@pytest.fixture(params=[scripts.NUM_ENDED_KEPT, 3], ids="{} rows kept".format)
def num_ended_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(scripts, "NUM_ENDED_KEPT", request.param)
    scripts.source.cache_clear()
    yield request.param
    scripts.source.cache_clear()


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
@pytest.mark.usefixtures("num_ended_kept")
def test_any_schedule_leaves_the_ledger_as_the_model_says(
    url: str, run_id: str, make_group: Callable[..., Group], seed: int
) -> None:
    schedule = Schedule(url, run_id, make_group, seed)
    try:
        schedule.run(num_actions=200)
    finally:
        schedule.close_clients()
    if seed < FEW_SCHEDULES:
        assert schedule.num_retired >= 6, "the schedule has not come far enough to prove anything"
        assert schedule.num_trained_again, "no learner went back behind a step"
