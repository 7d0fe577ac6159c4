"""Deadlines for asynchronous tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any


def run_bounded(test: Coroutine[Any, Any, None], timeout_s: float = 60.0) -> None:
    """Run a test. Fail if the test takes longer than ``timeout_s``, or leaves a task behind."""

    async def bounded() -> None:
        ours = asyncio.all_tasks()
        await asyncio.wait_for(test, timeout_s)
        # Tasks of gRPC end some iterations of the loop after their calls.
        with contextlib.suppress(TimeoutError):
            await until(lambda: not asyncio.all_tasks() - ours)
        left = [task.get_name() for task in asyncio.all_tasks() - ours]
        assert not left, f"tasks left behind: {left}"

    asyncio.run(bounded())


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until a condition is true that no event announces, by asking again and again.

    Raises:
        TimeoutError: the condition was not true within ``timeout_s``.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
