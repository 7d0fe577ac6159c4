"""A unit test that leaves a thread or a process behind fails, and names what it left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

GRACE_S = 5.0
"""Time that threads and processes have to end which a test has told to end."""


MAY_STAY = ("_poll_wrapper", "multiprocessing.resource_tracker", "tqdm_monitor")
"""What `grpc.aio`, `multiprocessing` and tqdm start once for a whole process, and never end."""


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    threads, processes = set(threading.enumerate()), set(_child_processes())
    yield
    deadline = time.monotonic() + GRACE_S
    while left := _left(threads, processes):
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {', '.join(left)}")
        time.sleep(0.01)


def _left(threads: set[threading.Thread], processes: set[int]) -> list[str]:
    left = [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    left += [f"process {pid} ({command})" for pid, command in _child_processes().items() if pid not in processes]
    return [one for one in left if not any(word in one for word in MAY_STAY)]


def _child_processes() -> dict[int, str]:
    """Command lines of this process's children, by process id; empty where there is no ``/proc``."""
    found = {}
    children: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            children += map(int, task.read_text().split())
    for pid in children:
        with contextlib.suppress(OSError):  # the child has ended
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") or "a zombie"
    return found
