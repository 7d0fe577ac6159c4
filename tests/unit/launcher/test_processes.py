"""Service processes are watched, explained and ended, whatever they do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from services.launcher.processes import ProcessGroup, ServiceProcess, wait_until_unused
from tests.fakes.waiting import until


def _service(tmp_path: Path, name: str, code: str) -> ServiceProcess:
    return ServiceProcess(name, [sys.executable, "-c", code], tmp_path / "logs" / f"{name}.log")


def _says_ready(service: ServiceProcess) -> bool:
    return b"ready" in service.log.read_bytes()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_dead_service_tells_its_last_error(tmp_path: Path) -> None:
    async def scenario() -> str:
        code = "import sys; print('noise'); print('error: model.path: nothing there', file=sys.stderr); sys.exit(2)"
        service = _service(tmp_path, "learner", code)
        await service.start()
        await service.wait()
        return service.failure()

    log = tmp_path / "logs" / "learner.log"
    assert asyncio.run(scenario()) == f"learner exited with 2: model.path: nothing there; its log is {log}"


def test_an_error_of_an_earlier_start_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    async def scenario() -> str:
        service = _service(tmp_path, "learner", "raise SystemExit(3)")
        service.log.parent.mkdir()
        service.log.write_text("error: the disk was full yesterday\n")
        await service.start()
        await service.wait()
        return service.failure()

    assert asyncio.run(scenario()).startswith("learner exited with 3; its log is")


def test_a_log_is_in_use_until_the_last_process_that_writes_it_has_ended(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)\n"
    )

    async def scenario() -> int:
        service = _service(tmp_path, "rollout-0", code)
        await service.start()
        await service.wait()
        return int(service.log.read_text())

    grandchild = asyncio.run(scenario())
    log = tmp_path / "logs" / "rollout-0.log"
    assert wait_until_unused([log], 0.0) == [log]
    os.kill(grandchild, signal.SIGKILL)
    assert wait_until_unused([log], 10.0) == []


def test_a_killed_service_names_the_signal_and_the_log(tmp_path: Path) -> None:
    async def scenario() -> str:
        service = _service(tmp_path, "rollout-0", "import os; os.kill(os.getpid(), 9)")
        await service.start()
        await service.wait()
        return service.failure()

    message = asyncio.run(scenario())
    assert message.startswith("rollout-0 was killed by SIGKILL")
    assert "rollout-0.log" in message


def test_the_first_that_died_is_the_cause_also_if_only_a_later_one_says_why(tmp_path: Path) -> None:
    async def scenario() -> str:
        group = ProcessGroup()
        telling = _service(tmp_path, "learner", "print('error: no batch came'); raise SystemExit(1)")
        silent = _service(tmp_path, "coordinator", "raise SystemExit(1)")
        for service in (silent, telling):  # the silent one has ended before the other one starts
            await group.start(service)
            await until(lambda service=service: service.ended_at is not None)  # type: ignore[misc]
        return group.failures()[0].name

    assert asyncio.run(scenario()) == "coordinator"


def test_a_service_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    child_file = tmp_path / "child"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )

    async def scenario() -> tuple[int, int, float]:
        service = _service(tmp_path, "stubborn", code)
        await service.start()
        await until(lambda: child_file.exists() and child_file.read_text())
        assert service._process is not None
        started = time.monotonic()
        await service.stop(timeout_s=0.5)
        return service._process.pid, int(child_file.read_text()), time.monotonic() - started

    pid, child, took = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert took < 20
    deadline = time.monotonic() + 20
    while (_is_alive(pid) or _is_alive(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)
    assert not _is_alive(child)


def test_those_who_use_a_service_are_stopped_before_it(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        f"    open({str(tmp_path / 'order')!r}, 'a').write(sys.argv[1] + ' ')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )

    async def scenario() -> None:
        group = ProcessGroup()
        for stage, name in enumerate(("coordinator", "reward", "learner")):
            service = _service(tmp_path, name, code)
            service.stage = stage
            service.command = [*service.command, name]
            await group.start(service)
            await until(partial(_says_ready, service))
        await group.stop_all(timeout_s=30)

    asyncio.run(asyncio.wait_for(scenario(), 120))
    assert (tmp_path / "order").read_text().split() == ["learner", "reward", "coordinator"]


def test_services_that_do_not_use_each_other_are_stopped_together(tmp_path: Path) -> None:
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )

    async def scenario() -> float:
        group = ProcessGroup()
        for index in range(4):
            service = _service(tmp_path, f"rollout-{index}", code)
            await group.start(service)
            await until(partial(_says_ready, service))
        started = time.monotonic()
        await group.stop_all(timeout_s=3)
        return time.monotonic() - started

    assert 3 <= asyncio.run(asyncio.wait_for(scenario(), 120)) < 11  # one after the other would take 12
