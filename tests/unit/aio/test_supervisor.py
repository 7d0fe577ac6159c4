"""Every task has an owner, and no task ends unnoticed."""

# ruff: noqa: PT012 - what has to raise is the whole block of a supervisor

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

import pytest

from rollmesh.aio import Supervisor
from rollmesh.errors import RollMeshError


async def last() -> None:
    await asyncio.sleep(60)


async def end() -> None:
    return None


async def fail(message: str = "broken", delay_s: float = 0.0) -> None:
    await asyncio.sleep(delay_s)
    raise KeyError(message)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` and demand that it leaves no task."""

    async def checked() -> None:
        await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(0)  # A cancellation that was not taken back would strike here.

    asyncio.run(checked())


def test_leaving_the_block_cancels_the_tasks_last_spawned_first() -> None:
    ended: list[str] = []

    async def record(name: str) -> None:
        try:
            await last()
        finally:
            await asyncio.sleep(0.01)
            ended.append(name)

    async def main() -> None:
        async with Supervisor() as supervisor:
            for name in ("first", "second", "third"):
                supervisor.spawn(record(name), name)
            await asyncio.sleep(0.01)
        assert ended == ["third", "second", "first"]

    run(main)


def test_a_task_that_raises_interrupts_the_body_and_fails_the_block_with_its_error() -> None:
    async def main() -> None:
        begin = time.monotonic()
        with pytest.raises(KeyError, match="broken"):
            async with Supervisor() as supervisor:
                supervisor.spawn(last(), "lasting")
                supervisor.spawn(fail(), "failing")
                await last()
        assert time.monotonic() - begin < 15

    run(main)


def test_a_task_that_merely_returns_fails_the_block() -> None:
    async def main() -> None:
        with pytest.raises(RollMeshError, match="'heartbeat' ended although it has to last"):
            async with Supervisor() as supervisor:
                supervisor.spawn(end(), "heartbeat")
                await last()

    run(main)


def test_a_task_that_somebody_cancels_fails_the_block() -> None:
    async def main() -> None:
        with pytest.raises(RollMeshError, match="'heartbeat' ended"):
            async with Supervisor() as supervisor:
                supervisor.spawn(last(), "heartbeat").cancel()
                await last()

    run(main)


def test_a_task_that_may_end_may_return_or_be_cancelled() -> None:
    async def main() -> None:
        async with Supervisor() as supervisor:
            supervisor.spawn(last(), "cancelled", may_end=True).cancel()
            assert await supervisor.spawn(asyncio.sleep(0, "result"), "returning", may_end=True) == "result"
            await asyncio.sleep(0.05)

    run(main)


def test_a_task_that_may_end_may_not_raise() -> None:
    async def main() -> None:
        with pytest.raises(KeyError, match="broken"):
            async with Supervisor() as supervisor:
                supervisor.spawn(fail(), "failing", may_end=True)
                await last()

    run(main)


def test_a_failure_while_the_body_does_not_wait_is_raised_all_the_same() -> None:
    async def main() -> None:
        with pytest.raises(KeyError, match="broken"):
            async with Supervisor() as supervisor:
                supervisor.spawn(fail(), "failing")
                with contextlib.suppress(asyncio.CancelledError):
                    await last()

    run(main)


def test_the_first_of_several_failures_is_raised_and_the_others_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail_in_the_end() -> None:
        try:
            await last()
        finally:
            raise ValueError("second")

    async def main() -> None:
        with pytest.raises(KeyError, match="first"):
            async with Supervisor() as supervisor:
                supervisor.spawn(fail_in_the_end(), "other")
                supervisor.spawn(fail("first", 0.01), "one")
                await last()

    run(main)
    assert ["second" in str(record.exc_info) for record in caplog.records] == [True]


def test_an_error_of_the_body_that_came_first_is_the_one_raised(caplog: pytest.LogCaptureFixture) -> None:
    async def fail_in_the_end() -> None:
        try:
            await last()
        finally:
            raise ValueError("clean-up")

    async def main() -> None:
        with pytest.raises(KeyError, match="body"):
            async with Supervisor() as supervisor:
                supervisor.spawn(fail_in_the_end(), "other")
                await asyncio.sleep(0)
                raise KeyError("body")

    run(main)
    assert "clean-up" in caplog.text


def test_a_failure_in_a_task_s_own_clean_up_fails_a_block_that_ended_well() -> None:
    async def fail_in_the_end() -> None:
        try:
            await last()
        finally:
            raise ValueError("not flushed")

    async def main() -> None:
        with pytest.raises(ValueError, match="not flushed"):
            async with Supervisor() as supervisor:
                supervisor.spawn(fail_in_the_end(), "flusher")
                await asyncio.sleep(0)

    run(main)


def test_cancelling_the_block_from_outside_cancels_the_tasks_and_stays_a_cancellation() -> None:
    ended: list[str] = []

    async def record() -> None:
        try:
            await last()
        finally:
            ended.append("task")

    async def block() -> None:
        async with Supervisor() as supervisor:
            supervisor.spawn(record(), "task")
            await last()

    async def main() -> None:
        task = asyncio.create_task(block())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["task"]

    run(main)


def test_a_cancellation_from_outside_in_the_moment_of_a_failure_stays_a_cancellation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def block() -> None:
        owner = asyncio.current_task()
        assert owner is not None
        async with Supervisor() as supervisor:
            supervisor.spawn(fail(), "failing").add_done_callback(lambda _: owner.cancel())
            await last()

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(block())

    run(main)
    assert "broken" in caplog.text


def test_a_timeout_around_the_block_stays_a_timeout() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), Supervisor() as supervisor:
                supervisor.spawn(last(), "task")
                await last()

    run(main)


def test_a_task_that_ignores_its_cancellation_does_not_hold_the_block_up(caplog: pytest.LogCaptureFixture) -> None:
    is_over = asyncio.Event()

    async def stubborn() -> None:
        while not is_over.is_set():
            try:
                await is_over.wait()
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        begin = time.monotonic()
        async with Supervisor(stop_timeout_s=0.1) as supervisor:
            task = supervisor.spawn(stubborn(), "stubborn")
            supervisor.spawn(last(), "lasting")
            await asyncio.sleep(0)
        assert time.monotonic() - begin < 6
        is_over.set()
        await asyncio.wait({task})

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "task 'stubborn' did not end within 0.1 s" in caplog.text
    assert "lasting" not in caplog.text


def test_nothing_is_spawned_outside_the_block() -> None:
    async def main() -> None:
        supervisor = Supervisor()
        with pytest.raises(RuntimeError, match="outside"):
            supervisor.spawn(last(), "early")
        async with supervisor:
            pass
        with pytest.raises(RuntimeError, match="outside"):
            supervisor.spawn(last(), "late")

    run(main)


def test_supervisors_nest_and_the_inner_failure_comes_out_of_both() -> None:
    async def inner() -> None:
        async with Supervisor() as supervisor:
            supervisor.spawn(fail("inner"), "failing")
            await last()

    async def main() -> None:
        with pytest.raises(KeyError, match="inner"):
            async with Supervisor() as outer:
                outer.spawn(last(), "lasting")
                outer.spawn(inner(), "inner")
                await last()

    run(main)
