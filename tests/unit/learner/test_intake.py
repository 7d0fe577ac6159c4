"""Waiting for a batch that takes long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rollmesh.errors import DeadlineError, RunEndedError
from rollmesh.replay.intake import Batch, BatchEntry
from rollmesh.types import Group, PolicyVersion, PromptId
from services.learner.intake import Intake
from services.learner.ranks import Ranks

GROUP = Group("train:0:9", PromptId("train", 0, 9), 9, 0, ())


class FilteringQueue:
    """Each wait for a batch takes too long; in the first ``num_filtering`` of them a group is filtered meanwhile."""

    def __init__(self, num_filtering: int, batch_after: int) -> None:
        self._num_filtering = num_filtering
        self._batch_after = batch_after
        self.num_waits = 0

    def take_batch(self, step: int, *_: object) -> Batch:
        self.num_waits += 1
        if self.num_waits <= self._batch_after:
            raise DeadlineError("no batch")
        return Batch(step, (BatchEntry(GROUP.group_id, 9, 7, 1, PolicyVersion(0, 0)),), is_last=False)

    def num_filtered(self) -> int:
        return min(self.num_waits, self._num_filtering)

    def payloads(self, group_ids: list[str]) -> list[Group]:
        assert list(group_ids) == [GROUP.group_id]
        return [GROUP]


def _intake(queue: FilteringQueue, check: Callable[[], None] = lambda: None) -> Intake:
    alone = Ranks(0, 1, torch.device("cpu"))
    return Intake(queue, alone, 1, 1, 1, timeout_s=0.1, check=check)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_filtering", [5, 0])
def test_a_batch_may_take_longer_than_the_queue_may_be_away(num_filtering: int) -> None:
    queue = FilteringQueue(num_filtering, batch_after=5)
    share = _intake(queue).take(1)
    assert share is not None
    assert (share.groups, share.num_filtered) == ((GROUP,), num_filtering)


def test_a_batch_that_does_not_come_ends_the_wait_with_the_run() -> None:
    queue = FilteringQueue(num_filtering=3, batch_after=1000)

    def check() -> None:
        if queue.num_waits == 7:
            raise RunEndedError("the run is over: nothing has moved for 600 s")

    with pytest.raises(RunEndedError, match="nothing has moved"):
        _intake(queue, check).take(1)
