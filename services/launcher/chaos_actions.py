"""The three things that chaos does to processes: kill, freeze, slow down.

A process that was stopped goes on in any case. A signal to the command raises no exception: the signal ends the pause
in which the command waits, and the command then lets the processes go on.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from services.launcher.chaos_processes import FoundProcess

SLOW_PERIOD_S = 0.2
"""The length of one cycle of `slow`: the processes run in the first part, and stand still in the second."""

Pause = Callable[[float], bool]
"""Waits for some seconds. Returns True, and at once, when a signal asks the command to end."""


def kill(processes: Sequence[FoundProcess]) -> int:
    """Send SIGKILL to all processes. Return how many of them were alive."""
    return sum(process.send(signal.SIGKILL) for process in processes)


def freeze(processes: Sequence[FoundProcess], duration_s: float, pause: Pause) -> int:
    """Stop all processes for ``duration_s`` seconds. Return how many of them were alive at the end."""
    try:
        for process in processes:
            process.send(signal.SIGSTOP)
        pause(duration_s)
    finally:
        num_alive = sum(process.send(signal.SIGCONT) for process in processes)
    return num_alive


def slow(processes: Sequence[FoundProcess], factor: float, duration_s: float, pause: Pause) -> int:
    """Let all processes run for the ``1 / factor``th part of each period, for ``duration_s`` seconds.

    A factor of 4 and a period of 0.2 s let the processes run for 0.05 s, and then stop them for 0.15 s.

    Returns:
        How many of the processes were alive at the end.
    """
    running_s = SLOW_PERIOD_S / factor
    end = time.monotonic() + duration_s
    num_alive, is_interrupted = len(processes), False
    while num_alive and not is_interrupted and time.monotonic() < end:
        num_alive = freeze(processes, SLOW_PERIOD_S - running_s, pause)
        is_interrupted = pause(running_s)
    return num_alive
