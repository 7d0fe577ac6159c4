"""The intake waits for a batch that takes a long time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rollmesh.errors import DeadlineError, RunEndedError, UnavailableError
from rollmesh.replay.batches import Batch
from rollmesh.replay.rows import GroupRow
from rollmesh.replay.staleness import StalenessWindow
from rollmesh.types import Group, GroupState, PolicyVersion, PromptId
from services.learner.intake import Intake, NoBatch, RankShare
from services.learner.ranks import Ranks

V0 = PolicyVersion(0, 0)
ROW = GroupRow(
    group_id="train:0:9",
    prompt_id=PromptId("train", 0, 9),
    sequence=9,
    state=GroupState.BATCHED,
    attempt=0,
    fencing_token=1,
    member="rollout-0",
    reason="",
    num_samples=1,
    num_tokens=7,
    oldest_version=V0,
    step=1,
)
GROUP = Group("train:0:9", PromptId("train", 0, 9), 9, 0, ())


class FilteringQueue:
    """A queue that has a batch after ``batch_after`` waits without a batch.

    A group is filtered during each of the first ``num_filtering`` waits.
    """

    def __init__(self, num_filtering: int, batch_after: int) -> None:
        self._num_filtering = num_filtering
        self._batch_after = batch_after
        self.num_waits = 0

    def take_batch(self, step: int, *_: object) -> Batch:
        self.num_waits += 1
        if self.num_waits <= self._batch_after:
            raise DeadlineError("no batch")
        return Batch(step, (ROW,), is_last=False)

    def num_filtered(self) -> int:
        return min(self.num_waits, self._num_filtering)

    def payloads(self, group_ids: list[str]) -> list[Group]:
        assert list(group_ids) == [GROUP.group_id]
        return [GROUP]


class AbsentQueue:
    """A queue that does not answer the first ``num_absent`` waits for a batch, and then has no group left."""

    def __init__(self, num_absent: int) -> None:
        self._num_absent = num_absent
        self.num_waits = 0

    def take_batch(self, *_: object) -> None:
        self.num_waits += 1
        if self.num_waits <= self._num_absent:
            raise UnavailableError("Redis does not answer")


def _intake(
    queue: FilteringQueue | AbsentQueue,
    check: Callable[[], None] = lambda: None,
    timeout_s: float = 0.1,
    is_publish_wanted: Callable[[], bool] = lambda: False,
) -> Intake:
    alone, window = Ranks(0, 1, torch.device("cpu")), StalenessWindow(0, 1, 1)
    return Intake(queue, alone, 1, 1, window, timeout_s, check, is_publish_wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_filtering", [5, 0])
def test_a_batch_may_take_longer_than_the_queue_may_be_away(num_filtering: int) -> None:
    queue = FilteringQueue(num_filtering, batch_after=5)
    share = _intake(queue).take(1, V0)
    assert isinstance(share, RankShare)
    assert (share.groups, share.num_filtered) == ((GROUP,), num_filtering)


def test_a_batch_that_does_not_come_ends_the_wait_with_the_run() -> None:
    queue = FilteringQueue(num_filtering=3, batch_after=1000)

    def check() -> None:
        if queue.num_waits == 7:
            raise RunEndedError("the run is over: nothing has moved for 600 s")

    with pytest.raises(RunEndedError, match="nothing has moved"):
        _intake(queue, check).take(1, V0)


def test_a_queue_that_is_away_for_a_moment_is_asked_again() -> None:
    queue = AbsentQueue(num_absent=2)
    assert _intake(queue, timeout_s=30.0).take(1, V0) is NoBatch.END
    assert queue.num_waits == 3


def test_a_queue_that_stays_away_ends_the_wait_with_its_own_error() -> None:
    with pytest.raises(DeadlineError, match=r"learner\.batch_timeout_s = 0\.1 passed: Redis does not answer"):
        _intake(AbsentQueue(num_absent=1000)).take(1, V0)


def test_a_worker_that_lacks_the_version_ends_the_wait_only_while_no_batch_is_complete() -> None:
    queue = FilteringQueue(num_filtering=0, batch_after=1)
    intake = _intake(queue, is_publish_wanted=lambda: True)
    assert intake.take(1, V0) is NoBatch.PUBLISH
    assert isinstance(intake.take(1, V0), RankShare), "a complete batch comes first: its step publishes anyway"
