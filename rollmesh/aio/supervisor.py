"""The owner of tasks. A task that ends early fails the owner's block, and the end of the block ends all tasks.

::

    async with Supervisor() as supervisor:
        supervisor.spawn(beat_forever(), "heartbeat")
        supervisor.spawn(answer_one(request), "request", may_end=True)
        await until_stopped()

A `Supervisor` differs from `asyncio.TaskGroup` in three ways:

* The end of the block cancels the tasks instead of waiting for them: the task spawned last comes first, and the time
  for all is bounded.
* A task that returns counts as a failure, unless it may end.
* The block raises the first failure itself, and not a group of exceptions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from rollmesh.errors import RollMeshError

_logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class Supervisor:
    """The owner of background tasks for the length of an ``async with`` block.

    When a task fails, the block's body is cancelled, and the block raises the task's error. Later failures are only
    logged. The block raises a cancellation from outside, or an error of the body that came first, rather than the error
    of a task.

    Args:
        stop_timeout_s: the time for all tasks together to end after their cancellation. Tasks that need longer are
            logged and left behind.
    """

    def __init__(self, stop_timeout_s: float = 5.0) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._tasks: dict[asyncio.Task[Any], None] = {}  # In the order of spawning.
        self._owner: asyncio.Task[Any] | None = None
        self._failure: BaseException | None = None
        self._is_leaving = False
        self._has_cancelled_owner = False

    async def __aenter__(self) -> Self:
        self._owner = asyncio.current_task()
        return self

    def spawn(
        self, coroutine: Coroutine[Any, Any, ResultT], name: str, *, may_end: bool = False
    ) -> asyncio.Task[ResultT]:
        """Start a task.

        Args:
            coroutine: the work of the task.
            name: the name of the task in errors and logs.
            may_end: whether the task may return, or be cancelled from outside, before the block ends. An error of the
                task fails the block in any case.

        Raises:
            RuntimeError: the call came before the block or after its end.
        """
        if self._owner is None or self._is_leaving:
            coroutine.close()
            raise RuntimeError(f"task {name!r} was spawned outside its supervisor's block")
        task = asyncio.create_task(coroutine, name=name)
        self._tasks[task] = None
        task.add_done_callback(lambda ended: self._ended(ended, may_end))
        return task

    def _ended(self, task: asyncio.Task[Any], may_end: bool) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is None:
            if may_end or self._is_leaving:
                return
            error = RollMeshError(f"task {task.get_name()!r} ended although it has to last")
        if self._failure is not None:
            _logger.error("task %r failed after another", task.get_name(), exc_info=error)
            return
        self._failure = error
        if not self._is_leaving:
            assert self._owner is not None
            self._has_cancelled_owner = True
            self._owner.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._owner is not None
        self._is_leaving = True
        is_cancelled = isinstance(error, asyncio.CancelledError)
        is_interrupted_by_task = self._has_cancelled_owner
        if is_interrupted_by_task and self._owner.uncancel() == 0:
            is_cancelled = False
        await self._stop_tasks()
        if self._failure is None:
            return
        if not is_cancelled and (error is None or is_interrupted_by_task):
            raise self._failure
        _logger.error("a task failed while its block was ending", exc_info=self._failure)

    async def _stop_tasks(self) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + self._stop_timeout_s
        remaining = list(self._tasks)
        try:
            while remaining:
                task = remaining.pop()
                task.cancel()
                await asyncio.wait({task}, timeout=max(0.0, end - clock()))
                if not task.done():
                    _logger.error("task %r did not end within %g s", task.get_name(), self._stop_timeout_s)
        finally:
            for task in remaining:  # Only after a cancellation from outside in the meantime.
                task.cancel()
