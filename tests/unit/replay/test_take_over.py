"""A learner that takes the queue over goes on after the step that its checkpoint covers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import redis

from rollmesh.errors import DeadlineError, ReplayError, SupersededError
from rollmesh.replay import batches as batches_module
from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import CommitOutcome, RecordedVersion
from rollmesh.replay.rows import GroupRow
from rollmesh.types import Group, GroupState, PolicyVersion, PromptId

S = GroupState
BATCH, WINDOW = 2, 3
FIRST_VERSION = PolicyVersion(0, 0)


class Mesh:
    """A ledger with its coordinator, one worker and as many learners as there are asked for."""

    def __init__(self, url: str, run_id: str, make_group: Callable[..., Group]) -> None:
        self.runner = asyncio.Runner()
        self.client = connect(url, 5.0)
        self.raw: redis.Redis = connect_blocking(url, 5.0)
        self.ledger = CoordinatorLedger(self.client, run_id, term=0)
        self.run_id, self.keys = run_id, Keys(run_id)
        self._make_group = make_group

    def close(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.close()
        self.raw.close()

    def learner(self) -> BatchQueue:
        return BatchQueue(self.raw, self.run_id)

    def open(self, count: int) -> None:
        self.runner.run(self.ledger.open_groups([PromptId("train", 0, index) for index in range(count)]))

    def lease(self, count: int, num_slots: int | None = None) -> list[GroupRow]:
        return self.runner.run(self.ledger.lease("rollout-0", 600.0, count, num_slots))

    def generate(self, count: int, version: PolicyVersion = FIRST_VERSION) -> None:
        for row in self.lease(count):
            group = self._make_group(row.prompt_id, row.sequence, row.attempt, version=version)
            outcome = self.runner.run(self.ledger.commit(group, row.fencing_token))
            assert outcome is CommitOutcome.ACCEPTED

    def train(self, learner: BatchQueue, *steps: int) -> list[list[int]]:
        """Take and train steps; returns the places of their groups."""
        places = []
        for step in steps:
            batch = learner.take_batch(step, BATCH, WINDOW, timeout_s=0)
            assert batch is not None
            learner.mark_trained(step)
            places.append([row.sequence for row in batch.rows])
        return places

    def states(self) -> list[GroupState]:
        async def all_rows() -> list[GroupRow]:
            return [row async for row in self.ledger.rows()]

        return [row.state for row in self.runner.run(all_rows())]

    def row(self, place: int) -> GroupRow:
        row = self.runner.run(self.ledger.row(f"train:0:{place}"))
        assert row is not None
        return row

    @property
    def num_slots_used(self) -> int:
        return self.runner.run(self.ledger.snapshot()).num_slots_used


@pytest.fixture
def mesh(url: str, run_id: str, make_group: Callable[..., Group]) -> Iterator[Mesh]:
    mesh = Mesh(url, run_id, make_group)
    yield mesh
    mesh.close()


def test_the_first_learner_takes_an_empty_queue_over(mesh: Mesh) -> None:
    learner = mesh.learner()
    assert learner.take_over(0) == (0, 0)
    mesh.open(2)
    mesh.generate(2)
    assert mesh.train(learner, 1) == [[0, 1]]


def test_the_steps_after_the_checkpoint_are_trained_again_on_the_same_groups_in_the_same_order(mesh: Mesh) -> None:
    mesh.open(8)
    mesh.generate(8)
    former = mesh.learner()
    assert mesh.train(former, 1, 2, 3) == [[0, 1], [2, 3], [4, 5]]
    former.take_batch(4, BATCH, WINDOW, timeout_s=0)
    mesh.runner.run(mesh.ledger.release_slots(3))
    assert mesh.num_slots_used == 2
    successor = mesh.learner()
    assert successor.take_over(1) == (6, 0)
    assert mesh.states() == [S.TRAINED] * 2 + [S.READY] * 6
    assert mesh.num_slots_used == 6
    assert mesh.train(successor, 2, 3, 4) == [[2, 3], [4, 5], [6, 7]]


def test_a_group_whose_samples_were_dropped_is_generated_again_at_its_place(mesh: Mesh) -> None:
    mesh.open(4)
    mesh.generate(4)
    mesh.train(mesh.learner(), 1, 2)
    mesh.raw.delete(mesh.keys.payload("train:0:1", mesh.row(1).fencing_token))
    assert mesh.learner().take_over(0) == (3, 1)
    again = mesh.row(1)
    assert (again.state, again.attempt, again.step, again.num_tokens) == (S.PENDING, 0, None, 0)
    assert "dropped before a checkpoint covered them" in again.reason
    assert [row.sequence for row in mesh.lease(4)] == [1]


def test_groups_that_a_checkpoint_covers_are_trained_even_where_the_ledger_did_not_hear_of_it(mesh: Mesh) -> None:
    mesh.open(4)
    mesh.generate(4)
    former = mesh.learner()
    mesh.train(former, 1)
    former.take_batch(2, BATCH, WINDOW, timeout_s=0)  # trained and saved; the learner died before it said so
    assert mesh.learner().take_over(2) == (0, 0)
    assert mesh.states() == [S.TRAINED] * 4
    mesh.runner.run(mesh.ledger.release_slots(2))
    assert mesh.num_slots_used == 0


def test_no_learner_goes_back_to_before_groups_that_are_gone(mesh: Mesh) -> None:
    mesh.open(6)
    mesh.generate(6)
    former = mesh.learner()
    mesh.train(former, 1, 2, 3)
    former.retire(2)
    with pytest.raises(ReplayError, match="the steps through 2 are retired: nothing is left to train on again after"):
        mesh.learner().take_over(1)
    assert mesh.train(former, 3) == [[4, 5]], "a refused learner takes nothing over"
    assert mesh.learner().take_over(2) == (2, 0)


def test_no_learner_goes_back_behind_a_step_of_which_some_groups_have_retired(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh.open(4)
    mesh.generate(4)
    former = mesh.learner()
    mesh.train(former, 1, 2)
    monkeypatch.setattr(batches_module, "_MOVED_PER_CALL", 1)
    monkeypatch.setattr(former, "_run", fail_after(former._run, 3))
    with pytest.raises(ConnectionError):
        former.retire(2)
    assert mesh.states() == [S.RETIRED] * 3 + [S.TRAINED]
    with pytest.raises(ReplayError, match="the steps through 2 are retired"):
        mesh.learner().take_over(1)


def fail_after(call: Callable[..., object], count: int) -> Callable[..., object]:
    """``call``, which the process does not survive after ``count`` times."""
    left = iter(range(count))

    def failing(*arguments: object) -> object:
        if next(left, None) is None:
            raise ConnectionError
        return call(*arguments)

    return failing


def test_a_checkpoint_that_is_newer_than_the_ledger_is_refused(mesh: Mesh) -> None:
    mesh.open(2)
    mesh.generate(2)
    mesh.train(mesh.learner(), 1)
    with pytest.raises(ReplayError, match="the ledger knows the steps through 1, not through 2"):
        mesh.learner().take_over(2)


def test_a_take_over_that_was_cut_short_is_repeated(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh.open(6)
    mesh.generate(6)
    mesh.train(mesh.learner(), 1, 2, 3)
    monkeypatch.setattr(batches_module, "_MOVED_PER_CALL", 2)
    cut_short = mesh.learner()
    monkeypatch.setattr(cut_short, "_run", fail_after(cut_short._run, 1))
    with pytest.raises(ConnectionError):
        cut_short.take_over(0)
    assert mesh.states() == [S.READY] * 2 + [S.TRAINED] * 4
    successor = mesh.learner()
    assert successor.take_over(0) == (4, 0)
    assert mesh.train(successor, 1, 2, 3) == [[0, 1], [2, 3], [4, 5]]


def test_two_learners_that_take_over_at_once_leave_one_in_charge(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh.open(4)
    mesh.generate(4)
    mesh.train(mesh.learner(), 1, 2)
    monkeypatch.setattr(batches_module, "_MOVED_PER_CALL", 1)
    one, other = mesh.learner(), mesh.learner()
    call = one._run

    def interrupted(*arguments: object) -> object:
        answer = call(*arguments)
        monkeypatch.setattr(one, "_run", call)
        other.take_over(0)
        return answer

    monkeypatch.setattr(one, "_run", interrupted)
    with pytest.raises(SupersededError):
        one.take_over(0)
    assert mesh.train(other, 1, 2) == [[0, 1], [2, 3]]


def test_groups_of_the_lineage_that_was_left_are_trained_inside_the_bound_and_else_generated_again(mesh: Mesh) -> None:
    mesh.open(4)
    mesh.generate(2, PolicyVersion(0, 3))
    mesh.generate(2, PolicyVersion(0, 4))
    learner = mesh.learner()
    learner.take_over(0)
    version = PolicyVersion(1, 6)
    with pytest.raises(DeadlineError):
        learner.take_batch(1, BATCH, WINDOW, 0, version.lineage, lowest_number=version.number - 2)
    assert mesh.states() == [S.PENDING] * 2 + [S.READY] * 2
    assert mesh.row(0).reason == "too old after a resume: 0.3"
    assert not list(mesh.raw.scan_iter(f"{mesh.keys.prefix}payload:train:0:0:*"))
    mesh.generate(2, version)
    assert learner.take_batch(1, BATCH, WINDOW, 0, version.lineage, version.number - 2) is not None
    kept = learner.take_batch(2, BATCH, WINDOW, 0, version.lineage, version.number - 2)
    assert kept is not None
    assert [row.oldest_version for row in kept.rows] == [PolicyVersion(0, 4)] * 2


def test_no_more_groups_are_generated_at_a_time_than_there_are_slots_before_them(mesh: Mesh) -> None:
    mesh.open(6)
    assert [row.sequence for row in mesh.lease(6, num_slots=4)] == [0, 1, 2, 3]
    assert mesh.lease(6, num_slots=4) == []


def test_the_newest_version_is_remembered_and_an_older_one_changes_nothing(mesh: Mesh) -> None:
    assert mesh.runner.run(mesh.ledger.newest_version()) is None
    for version, step in ((PolicyVersion(0, 7), 7), (PolicyVersion(1, 8), 4), (PolicyVersion(0, 6), 6)):
        mesh.runner.run(mesh.ledger.record_version(version, step))
    assert mesh.runner.run(mesh.ledger.newest_version()) == RecordedVersion(PolicyVersion(1, 8), 4)


def test_a_ledger_that_was_closed_is_open_again(mesh: Mesh) -> None:
    mesh.open(2)
    mesh.generate(2)
    mesh.train(mesh.learner(), 1)
    mesh.runner.run(mesh.ledger.close())
    mesh.learner().take_over(1)
    assert not mesh.runner.run(mesh.ledger.is_closed())
    mesh.runner.run(mesh.ledger.open_groups([PromptId("train", 0, 2)]))
