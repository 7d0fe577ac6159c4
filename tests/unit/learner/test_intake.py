"""Waiting for a batch while groups are filtered instead."""

from __future__ import annotations

import pytest
import torch

from rollmesh.errors import DeadlineError
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


def _intake(queue: FilteringQueue) -> Intake:
    alone = Ranks(0, 1, torch.device("cpu"))
    return Intake(queue, alone, 1, 1, 1, timeout_s=0.1, check=lambda: None)  # type: ignore[arg-type]


def test_the_time_for_a_batch_begins_anew_while_groups_are_filtered() -> None:
    queue = FilteringQueue(num_filtering=5, batch_after=5)
    share = _intake(queue).take(1)
    assert share is not None
    assert (share.groups, share.num_filtered) == ((GROUP,), 5)


def test_a_batch_that_does_not_come_although_nothing_is_filtered_ends_the_wait() -> None:
    queue = FilteringQueue(num_filtering=3, batch_after=1000)
    with pytest.raises(DeadlineError, match=r"learner\.batch_timeout_s = 0\.1 passed: no batch"):
        _intake(queue).take(1)
    assert queue.num_waits == 4
