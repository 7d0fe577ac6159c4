"""A checkpoint is due after a number of steps, and after a time."""

from __future__ import annotations

import torch

from services.learner.checkpoint_schedule import CheckpointSchedule
from services.learner.config import CheckpointSection
from services.learner.ranks import Ranks

CPU = torch.device("cpu")


class Clock:
    """A clock that tests set."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_the_time_counts_from_the_checkpoint_before_whatever_made_it_due() -> None:
    clock = Clock()
    section = CheckpointSection(every_steps=10, every_minutes=1.5)
    schedule = CheckpointSchedule(section, Ranks(0, 1, CPU), clock)
    assert [schedule.is_due(step) for step in (9, 10, 11)] == [False, True, False]
    clock.now_s += 89
    assert not schedule.is_due(12)
    clock.now_s += 1
    assert schedule.is_due(13)
    schedule.begin()
    assert not schedule.is_due(14)
    clock.now_s += 60
    schedule.begin()
    clock.now_s += 60
    assert not schedule.is_due(15)


def test_without_an_interval_nothing_is_due() -> None:
    clock = Clock()
    section = CheckpointSection(every_steps=None, every_minutes=None)
    schedule = CheckpointSchedule(section, Ranks(0, 1, CPU), clock)
    clock.now_s += 1e6
    assert not schedule.is_due(50)


def test_the_clock_of_another_rank_does_not_count() -> None:
    class Second(Ranks):
        """Rank 1 of two; rank 0 says that nothing is due."""

        def max(self, values: object) -> list[float]:
            assert values == [0.0]
            return [0.0]

    clock = Clock()
    schedule = CheckpointSchedule(CheckpointSection(every_minutes=1), Second(1, 2, CPU), clock)
    clock.now_s += 1e6
    assert not schedule.is_due(1)
