"""The frame of a service process: its event loop, its signals, an end within a bounded time, and its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

_logger = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 5.0
"""Time for cancelled tasks to end."""

ServiceMain = Callable[[asyncio.Event], Coroutine[Any, Any, int]]


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a process in order: SIGTERM, SIGINT and SIGHUP.

    SIGHUP is left out where this process ignores SIGHUP, as under `nohup`.
    """
    always = (signal.SIGTERM, signal.SIGINT)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)


def run_service(main: ServiceMain, name: str, *, stop_timeout_s: float = 30.0) -> int:
    """Run a service until its main coroutine ends.

    The first of the `stop_signals` sets the event that ``main`` takes. Then ``main`` finishes its work and returns. A
    second signal cancels ``main``, and so does the end of ``stop_timeout_s`` after the first signal. A task that
    ignores its cancellation is left behind a few seconds later.

    Args:
        main: the service: a function of the event that returns the exit code.
        name: the member's name, for logs.
        stop_timeout_s: the time for ``main`` to return after the first signal.

    Returns:
        The exit code that ``main`` returned; 128 + the number of the signal if ``main`` was cancelled.

    Raises:
        Exception: the error that ``main`` raised.
    """
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        exit_code: int = loop.run_until_complete(_drive(main, name, stop_timeout_s))
        return exit_code
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _drive(main: ServiceMain, name: str, stop_timeout_s: float) -> int:
    """Run ``main`` until its end, or until `_CANCEL_TIMEOUT_S` after its cancellation. Return the exit code."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    work = loop.create_task(main(stop), name=name)
    is_abandoned: asyncio.Future[None] = loop.create_future()
    ends: set[asyncio.Future[Any]] = {work, is_abandoned}
    first_signal = 0

    def abandon() -> None:
        if not is_abandoned.done():
            is_abandoned.set_result(None)

    def cancel(reason: str) -> None:
        if not work.done():
            _logger.error("%s: cancelled %s", name, reason)
            work.cancel()
            loop.call_later(_CANCEL_TIMEOUT_S, abandon)

    def receive(number: signal.Signals) -> None:
        nonlocal first_signal
        if first_signal:
            cancel(f"by a second signal, {number.name}")
            return
        first_signal = number
        _logger.info("%s: stopping on %s", name, number.name)
        stop.set()
        loop.call_later(stop_timeout_s, cancel, f"because it did not stop within {stop_timeout_s:g} s")

    try:
        with _signals_to(receive):
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            _logger.error("%s: ignores its cancellation, left behind", name)
        if first_signal and (not work.done() or work.cancelled()):
            return 128 + first_signal
        return work.result()
    finally:
        await _cancel_the_rest()


@contextlib.contextmanager
def _signals_to(receive: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``receive`` on the loop for each of the `stop_signals`. Outside the main thread this has no effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = stop_signals()
    for number in numbers:
        loop.add_signal_handler(number, functools.partial(receive, number))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _cancel_the_rest() -> None:
    """End the asynchronous generators, and the tasks that no supervisor owns, such as tasks of libraries."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        _, stuck = await asyncio.wait(rest, timeout=_CANCEL_TIMEOUT_S)
        for task in stuck:
            _logger.error("task %r did not end within %g s", task.get_name(), _CANCEL_TIMEOUT_S)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.get_running_loop().shutdown_asyncgens(), _CANCEL_TIMEOUT_S)
