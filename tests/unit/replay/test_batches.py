from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from rollmesh.errors import DeadlineError, ReplayError
from rollmesh.replay import batches as batches_module
from rollmesh.replay.batches import Batch, BatchQueue
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.replay.rows import GroupRow
from rollmesh.types import Group, GroupState, PromptId

MakeGroup = Callable[..., Group]


class Line:
    """A ledger driven from a test that is not asynchronous: groups are named by their sequence."""

    def __init__(self, runner: asyncio.Runner, ledger: CoordinatorLedger, make_group: MakeGroup) -> None:
        self._runner, self._ledger, self._make_group = runner, ledger, make_group
        self._leases: dict[int, GroupRow] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._ledger, name)
        return lambda *args, **kwargs: self._runner.run(method(*args, **kwargs))

    def open(self, count: int) -> None:
        """Open and lease ``count`` groups."""
        start = self.snapshot().num_opened
        self.open_groups([PromptId("train", 0, index) for index in range(start, start + count)])
        self._leases |= {row.sequence: row for row in self.lease("rollout-0", 60, count)}

    def finish(self, *sequences: int) -> None:
        for sequence in sequences:
            row = self._leases[sequence]
            group = self._make_group(row.prompt_id, sequence=sequence, num_tokens=sequence + 1)
            assert self.commit(group, row.fencing_token) is CommitOutcome.ACCEPTED

    def finish_together(self, count: int) -> None:
        """The first ``count`` groups, in as few round trips as they need."""

        async def commit_all() -> list[CommitOutcome]:
            rows = [self._leases[sequence] for sequence in range(count)]
            groups = [self._make_group(row.prompt_id, sequence=row.sequence) for row in rows]
            return await asyncio.gather(
                *(self._ledger.commit(group, row.fencing_token) for group, row in zip(groups, rows, strict=True))
            )

        assert set(self._runner.run(commit_all())) == {CommitOutcome.ACCEPTED}

    def fail(self, sequence: int) -> None:
        row = self._leases[sequence]
        self.give_back(row.group_id, row.fencing_token, "broken", is_final=True)


@pytest.fixture
def line(url: str, run_id: str, make_group: MakeGroup) -> Iterator[Line]:
    with asyncio.Runner() as runner:
        client = connect(url, 5.0)
        yield Line(runner, CoordinatorLedger(client, run_id, term=0), make_group)
        runner.run(client.aclose())


@pytest.fixture
def queue(raw: redis.Redis, run_id: str) -> BatchQueue:
    return BatchQueue(raw, run_id)


@pytest.fixture
def patient_queue(url: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchQueue]:
    """One that looks again only when it is woken."""
    monkeypatch.setattr(batches_module, "_LONGEST_WAIT_S", 60.0)
    client = connect_blocking(url, 120.0)
    yield BatchQueue(client, run_id)
    client.close()


def sequences(batch: Batch | None) -> list[int]:
    assert batch is not None
    return [row.sequence for row in batch.rows]


def assert_no_batch(queue: BatchQueue, step: int, size: int, window: int) -> None:
    with pytest.raises(DeadlineError):
        queue.take_batch(step, size, window, timeout_s=0)


def test_a_straggler_is_overtaken_by_exactly_one_less_than_the_window(line: Line, queue: BatchQueue) -> None:
    window = 4
    line.open(10)
    line.finish(*range(1, 10))
    taken = [sequences(queue.take_batch(step, 1, window, 1.0)) for step in (1, 2, 3)]
    assert taken == [[1], [2], [3]]
    assert_no_batch(queue, 4, 1, window)
    line.finish(0)
    assert sequences(queue.take_batch(4, 3, window, 1.0)) == [0, 4, 5]


def test_a_window_of_one_is_strict_first_in_first_out(line: Line, queue: BatchQueue) -> None:
    line.open(4)
    line.finish(3, 1, 2)
    assert_no_batch(queue, 1, 1, 1)
    line.finish(0)
    assert sequences(queue.take_batch(1, 4, 1, 1.0)) == [0, 1, 2, 3]


def test_a_batch_that_cannot_be_filled_changes_nothing(line: Line, queue: BatchQueue) -> None:
    line.open(4)
    line.finish(0, 1, 3)
    before = line.snapshot()
    assert_no_batch(queue, 1, 3, 1)
    assert line.snapshot() == before
    line.finish(2)
    assert sequences(queue.take_batch(1, 3, 1, 1.0)) == [0, 1, 2]


def test_a_group_that_failed_no_longer_holds_the_window_back(line: Line, queue: BatchQueue) -> None:
    line.open(4)
    line.finish(1, 2, 3)
    assert_no_batch(queue, 1, 3, 2)
    line.fail(0)
    assert sequences(queue.take_batch(1, 3, 2, 1.0)) == [1, 2, 3]


def test_a_step_gets_the_same_batch_when_it_asks_again(line: Line, queue: BatchQueue) -> None:
    line.open(4)
    line.finish(0, 1, 2, 3)
    first = queue.take_batch(1, 2, 1, 1.0)
    assert queue.take_batch(1, 2, 1, 1.0) == first
    assert sequences(queue.take_batch(2, 2, 1, 1.0)) == [2, 3]
    assert queue.take_batch(1, 2, 1, 1.0) == first


def test_the_last_batch_may_be_partial_once_the_ledger_is_closed(line: Line, queue: BatchQueue) -> None:
    line.open(5)
    line.finish(0, 1, 2, 3)
    first = queue.take_batch(1, 3, 5, 1.0)
    assert first is not None
    assert not first.is_last
    line.close()
    assert_no_batch(queue, 2, 3, 5)  # one is still being worked on
    line.finish(4)
    last = queue.take_batch(2, 3, 5, 1.0)
    assert last is not None
    assert (sequences(last), last.is_last) == ([3, 4], True)
    assert queue.take_batch(2, 3, 5, 1.0) == last
    assert queue.take_batch(3, 3, 5, 1.0) is None


def test_a_full_batch_is_the_last_when_the_closed_ledger_has_nothing_left(line: Line, queue: BatchQueue) -> None:
    line.open(4)
    line.close()
    line.finish(0, 1, 2, 3)
    batches = [queue.take_batch(step, 2, 1, 1.0) for step in (1, 2)]
    assert [batch is not None and batch.is_last for batch in batches] == [False, True]


def test_there_is_no_batch_when_all_that_was_left_has_failed(line: Line, queue: BatchQueue) -> None:
    line.open(1)
    line.close()
    line.fail(0)
    assert queue.take_batch(1, 2, 1, 1.0) is None


def test_a_waiting_learner_is_woken_by_the_commit_that_completes_its_batch(
    line: Line, patient_queue: BatchQueue, raw: redis.Redis, run_id: str
) -> None:
    line.open(2)
    line.finish(0)
    taken: list[list[int]] = []
    learner = threading.Thread(target=lambda: taken.append(sequences(patient_queue.take_batch(1, 2, 1, 20.0))))
    learner.start()
    time.sleep(0.2)
    assert not taken
    line.finish(1)
    learner.join(40)
    assert taken == [[0, 1]]
    assert raw.llen(Keys(run_id).wake) <= 1


def test_a_waiting_learner_is_woken_by_the_closing_of_the_ledger(line: Line, patient_queue: BatchQueue) -> None:
    line.open(1)
    line.finish(0)
    closer = threading.Timer(0.1, line.close)
    closer.start()
    batch = patient_queue.take_batch(1, 2, 1, 20.0)
    closer.join()
    assert sequences(batch) == [0]


def test_the_deadline_names_what_the_batch_waits_for(line: Line, queue: BatchQueue) -> None:
    line.open(3)
    line.finish(2)
    started_at = time.monotonic()
    with pytest.raises(DeadlineError, match=r"no batch of 2 groups for step 7 in 0\.2 s: 0 pending, 2 leased, 1 ready"):
        queue.take_batch(7, 2, 1, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - started_at < 20


def test_a_server_that_stays_away_ends_in_the_deadline(run_id: str) -> None:
    client = connect_blocking("unix:///nowhere/redis.sock", 0.5)
    with pytest.raises(DeadlineError, match="Redis does not answer"):
        BatchQueue(client, run_id).take_batch(1, 2, 1, timeout_s=0.3)


def test_payloads_come_back_in_the_order_asked_for(line: Line, queue: BatchQueue) -> None:
    line.open(40)
    line.finish(*range(40))
    batch = queue.take_batch(1, 40, 1, 1.0)
    assert batch is not None
    wanted = list(reversed(batch.rows))
    groups = queue.payloads([row.group_id for row in wanted])
    assert [group.sequence for group in groups] == list(range(39, -1, -1))
    assert [group.num_tokens for group in groups] == [row.num_tokens for row in wanted]
    assert [len(group.samples) for group in groups] == [row.num_samples for row in wanted]
    assert queue.payloads([]) == []


def test_a_batch_of_more_groups_than_one_command_takes_moves_whole(line: Line, queue: BatchQueue) -> None:
    size = 1100
    line.open(size)
    line.finish_together(size)
    assert sequences(queue.take_batch(1, size, window=1, timeout_s=1)) == list(range(size))
    assert line.snapshot().num_groups[GroupState.BATCHED] == size
    assert queue.mark_trained(1) == size
    assert line.snapshot().num_groups[GroupState.TRAINED] == size
    assert line.release_slots(1) == size
    assert queue.retire(1) == size
    assert line.snapshot().num_groups[GroupState.RETIRED] == size


def test_a_missing_or_damaged_payload_is_named(line: Line, queue: BatchQueue, raw: redis.Redis, run_id: str) -> None:
    line.open(2)
    line.finish(0, 1)
    batch = queue.take_batch(1, 2, 1, 1.0)
    assert batch is not None
    first, second = (row.group_id for row in batch.rows)
    keys: dict[str, Any] = {group_id: raw.hget(Keys(run_id).row(group_id), "payload") for group_id in (first, second)}
    raw.delete(keys[first])
    raw.set(keys[second], b"\x93 what?")
    with pytest.raises(ReplayError, match=f"group {first} has no payload"):
        queue.payloads([first])
    with pytest.raises(ReplayError, match=f"payload of group {second} cannot be read"):
        queue.payloads([second])


def test_slots_come_back_when_the_version_is_committed_not_when_trained(line: Line, queue: BatchQueue) -> None:
    line.open(6)
    line.finish(*range(6))
    for step in (1, 2):
        queue.take_batch(step, 2, 1, 1.0)
    assert line.release_slots(1) == 0
    assert [queue.mark_trained(1), queue.mark_trained(1)] == [2, 2]
    assert line.snapshot().num_slots_used == 6
    assert line.release_slots(1) == 2
    assert line.release_slots(1) == 0
    queue.mark_trained(2)
    assert line.snapshot().num_slots_used == 4
    assert line.release_slots(2) == 2


def test_retirement_drops_payloads_of_covered_steps_and_keeps_the_rows(
    line: Line, queue: BatchQueue, raw: redis.Redis, run_id: str
) -> None:
    line.open(6)
    line.finish(*range(6))
    for step in (1, 2, 3):
        queue.take_batch(step, 2, 1, 1.0)
    queue.mark_trained(1)
    queue.mark_trained(2)
    assert queue.retire(1) == 2
    assert queue.retire(9) == 2  # step 3 is not trained yet
    assert queue.retire(9) == 0
    assert len(list(raw.scan_iter(f"*{{{run_id}}}:payload:*"))) == 2
    row = line.row("train:0:0")
    assert (row.state, row.step, row.num_samples) == (GroupState.RETIRED, 1, 2)
    assert line.release_slots(2) == 4  # retired before its version was committed, and still set free


def test_a_commit_repeated_after_retirement_leaves_nothing_behind(
    line: Line, queue: BatchQueue, raw: redis.Redis, run_id: str, make_group: MakeGroup
) -> None:
    line.open(1)
    line.finish(0)
    queue.take_batch(1, 1, 1, 1.0)
    queue.mark_trained(1)
    queue.retire(1)
    row = line.row("train:0:0")
    assert line.commit(make_group(row.prompt_id), row.fencing_token) is CommitOutcome.DUPLICATE
    assert not list(raw.scan_iter(f"*{{{run_id}}}:payload:*"))


def test_a_step_without_a_batch_cannot_be_trained(queue: BatchQueue) -> None:
    with pytest.raises(ReplayError, match="step 3 was marked trained"):
        queue.mark_trained(3)


def test_a_commit_that_leaves_too_few_groups_for_a_batch_does_not_wake_the_learner(
    line: Line, queue: BatchQueue, raw: redis.Redis, run_id: str
) -> None:
    line.open(3)
    with pytest.raises(DeadlineError):
        queue.take_batch(1, 2, 1, timeout_s=0.05)
    raw.delete(Keys(run_id).wake)
    line.finish(0)
    assert not raw.exists(Keys(run_id).wake)
    line.finish(1)
    assert raw.exists(Keys(run_id).wake)


def test_the_last_commit_of_a_closed_ledger_wakes_the_learner_for_less_than_a_batch(
    line: Line, queue: BatchQueue, raw: redis.Redis, run_id: str
) -> None:
    line.open(1)
    line.close()
    with pytest.raises(DeadlineError):
        queue.take_batch(1, 2, 1, timeout_s=0.05)
    raw.delete(Keys(run_id).wake)
    line.finish(0)
    assert raw.exists(Keys(run_id).wake)
