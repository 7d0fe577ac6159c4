"""A service process stops when told to, in bounded time, with an exit code that tells the truth."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rollmesh.aio import run_service, service, stop_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_the_exit_code_is_what_the_service_returned() -> None:
    async def main(stop: asyncio.Event) -> int:
        return 3

    assert run_service(main, "reward") == 3


def test_what_the_service_raises_comes_out() -> None:
    async def main(stop: asyncio.Event) -> int:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        run_service(main, "reward")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_service_to_stop(number: signal.Signals) -> None:
    async def main(stop: asyncio.Event) -> int:
        send(number)
        await asyncio.wait_for(stop.wait(), 10)
        return 0

    assert run_service(main, "reward") == 0


def test_the_second_signal_cancels_it() -> None:
    async def main(stop: asyncio.Event) -> int:
        send(signal.SIGTERM)
        await stop.wait()
        send(signal.SIGINT)
        await asyncio.sleep(60)
        return 0

    assert run_service(main, "reward") == 128 + signal.SIGTERM


def test_a_service_that_does_not_stop_in_time_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    async def main(stop: asyncio.Event) -> int:
        send(signal.SIGTERM)
        await asyncio.sleep(60)
        return 0

    assert run_service(main, "reward", stop_timeout_s=0.1) == 128 + signal.SIGTERM
    assert "did not stop within 0.1 s" in caplog.text


def test_a_service_that_ignores_its_cancellation_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_CANCEL_TIMEOUT_S", 0.1)

    async def main(stop: asyncio.Event) -> int:
        send(signal.SIGTERM)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                continue
        return 0

    begin = time.monotonic()
    assert run_service(main, "reward", stop_timeout_s=0.1) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 15
    assert "ignores its cancellation" in caplog.text


def test_tasks_that_nobody_owns_are_ended_with_the_service() -> None:
    ended: list[str] = []

    async def stray() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("stray")

    async def main(stop: asyncio.Event) -> int:
        main.task = asyncio.create_task(stray())  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        return 0

    assert run_service(main, "reward") == 0
    assert ended == ["stray"]


def test_a_clean_up_after_a_signal_may_fail_and_says_so() -> None:
    async def main(stop: asyncio.Event) -> int:
        send(signal.SIGTERM)
        await stop.wait()
        raise OSError("not flushed")

    with pytest.raises(OSError, match="not flushed"):
        run_service(main, "reward")


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    async def main(stop: asyncio.Event) -> int:
        return 0

    run_service(main, "reward")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_service_runs_in_a_thread_too_without_signals() -> None:
    codes: list[int] = []

    async def main(stop: asyncio.Event) -> int:
        return 5

    thread = threading.Thread(target=lambda: codes.append(run_service(main, "reward")))
    thread.start()
    thread.join(10)
    assert codes == [5]


PROGRAM = """
import asyncio, sys
from rollmesh.aio import run_service

async def main(stop):
    print("ready", flush=True)
    await stop.wait()
    print("flushed", flush=True)
    return 0

sys.exit(run_service(main, "reward"))
"""


def test_a_real_process_ends_in_good_order_on_sigterm() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert output == "flushed\n"
    assert process.returncode == 0


def test_stopping_is_logged_with_the_signal(caplog: pytest.LogCaptureFixture) -> None:
    async def main(stop: asyncio.Event) -> int:
        send(signal.SIGTERM)
        await stop.wait()
        return 0

    with caplog.at_level(logging.INFO):
        run_service(main, "reward-1")
    assert "reward-1: stopping on SIGTERM" in caplog.text


def test_a_hangup_ends_a_service_in_order_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert set(stop_signals()) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` starts a process
        assert set(stop_signals()) == {signal.SIGTERM, signal.SIGINT}
    finally:
        signal.signal(signal.SIGHUP, before)
