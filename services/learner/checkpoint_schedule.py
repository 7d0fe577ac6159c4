"""The steps after which a checkpoint is due: by the number of steps, and by the time since the checkpoint before."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.learner.config import CheckpointSection
from services.learner.ranks import Ranks


class CheckpointSchedule:
    """The schedule of a run's checkpoints. The last step has a checkpoint in any case.

    Args:
        section: the settings of checkpoints.
        ranks: the process group. The clock of rank 0 decides for all.
        clock: seconds; the first checkpoint is due `every_minutes` after the schedule is made.
    """

    def __init__(self, section: CheckpointSection, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        self._section = section
        self._ranks = ranks
        self._clock = clock
        self._last_s = clock()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step``. Every rank gets the same answer. Collective."""
        every_steps, every_minutes = self._section.every_steps, self._section.every_minutes
        if every_steps is not None and step % every_steps == 0:
            return True
        if every_minutes is None:
            return False
        is_late = self._ranks.is_first and self._clock() - self._last_s >= 60 * every_minutes
        (answer,) = self._ranks.max([float(is_late)])
        return answer > 0

    def begin(self) -> None:
        """Record that a checkpoint begins now."""
        self._last_s = self._clock()
