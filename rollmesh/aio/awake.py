"""Time that leaves out what a process has slept through.

A process that was stopped (a suspended machine, a frozen container, SIGSTOP) has heard from nobody meanwhile. It must
not take that for everybody's silence, so whoever judges silence measures it in the time that this process was awake.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def boot_time() -> float:
    """Seconds since the machine started, its suspensions included where the system can tell (Linux)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class AwakeClock:
    """A clock that must be read often: a gap between two readings above ``limit_s`` was sleep and does not count.

    A process that was too busy to read its clock for so long could hear nobody either, and is treated alike.

    Example: with a limit of 3 s and readings at 10, 11, 71 and 72 s, the clock goes from 0 to 1, 1 and 2 s, and
    `take_slept_s` gives 60.

    Args:
        limit_s: longer than its owner ever leaves it unread while awake.
        source: seconds that go on while the process sleeps.
    """

    def __init__(self, limit_s: float, source: Callable[[], float] = boot_time) -> None:
        self._limit_s = limit_s
        self._source = source
        self._last_s = source()
        self._awake_s = 0.0
        self._slept_s = 0.0

    def __call__(self) -> float:
        """Seconds that the process was awake since the clock was made."""
        now_s = self._source()
        gap_s, self._last_s = now_s - self._last_s, now_s
        if gap_s <= self._limit_s:
            self._awake_s += gap_s
        else:
            self._slept_s += gap_s
        return self._awake_s

    def take_slept_s(self) -> float:
        """Seconds of sleep since the last call of this method."""
        self()
        slept_s, self._slept_s = self._slept_s, 0.0
        return slept_s
