"""A clock that leaves out the time in which this process was stopped.

A process is stopped by a suspended machine, a frozen container or SIGSTOP. A stopped process hears from no peer. It
must not take this for the silence of its peers. So silence is measured in the time in which this process was awake.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def boot_time() -> float:
    """Return the seconds since the machine started. On Linux they include the time of suspensions."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class AwakeClock:
    """A clock that leaves out the time in which this process was stopped.

    The owner reads the clock often. A gap of more than ``limit_s`` between two readings was sleep, and does not count.
    A process that was too busy to read its clock could not hear its peers either; its gap does not count either.

    Example: a clock with a limit of 3 s is made at 10 s. Its readings at 11, 71 and 72 s are 1, 1 and 2 s. Then
    `take_slept_s` returns 60 s.

    Args:
        limit_s: more than the longest time between two readings while the process is awake.
        source: a clock in seconds that goes on while the process is stopped.
    """

    def __init__(self, limit_s: float, source: Callable[[], float] = boot_time) -> None:
        self._limit_s = limit_s
        self._source = source
        self._last_s = source()
        self._awake_s = 0.0
        self._slept_s = 0.0

    def __call__(self) -> float:
        """Return the seconds that the process was awake since the clock was made."""
        now_s = self._source()
        gap_s, self._last_s = now_s - self._last_s, now_s
        if gap_s <= self._limit_s:
            self._awake_s += gap_s
        else:
            self._slept_s += gap_s
        return self._awake_s

    def take_slept_s(self) -> float:
        """Return the seconds of sleep since the last call of this method."""
        self()
        slept_s, self._slept_s = self._slept_s, 0.0
        return slept_s
