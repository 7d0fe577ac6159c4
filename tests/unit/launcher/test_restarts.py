"""Processes that end while the run goes on are started again, with pauses and a budget."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from rollmesh.errors import EXIT_START_AGAIN
from services.launcher.processes import ServiceProcess, wait_until_unused
from services.launcher.restarts import HEALTHY_S, PAUSES_S, Restarts


class _Rig:
    """The new starts of one service, whose every process ends by the same code; the test moves the clock."""

    def __init__(self, folder: Path, code: str, name: str = "reward") -> None:
        self.now_s = 1000.0
        self.warnings: list[str] = []
        self.restarts = Restarts(None, folder, self.warnings.append, lambda: self.now_s)
        log = folder / "logs" / f"{name}.log"
        self.service = ServiceProcess(name, [sys.executable, "-c", code], log)

    async def death(self, after_s: float = 0.0) -> None:
        """Let the process run for ``after_s``, and wait until it has ended."""
        if not self.service.is_running and self.service.exit_code is None:
            await self.service.start()
        self.now_s += after_s
        await self.service.wait()

    async def pause(self) -> float:
        """Wait until the service is started again. Return the pause in seconds."""
        began_s = self.now_s
        while await self.restarts.take(self.service):
            if not self.restarts.is_due(self.service.name):
                return self.now_s - began_s
            self.now_s += 0.5
        raise AssertionError("the service is not started again")


REPOSITORY = Path(__file__).resolve().parents[3]
KILLED = "import os; os.kill(os.getpid(), 9)"
ASKS = f"print('error: the engine died'); raise SystemExit({EXIT_START_AGAIN})"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(KILLED, "reward was killed by SIGKILL"), (ASKS, f"reward exited with {EXIT_START_AGAIN}: the engine died")],
)
def test_a_process_that_a_signal_ended_or_that_asks_for_it_is_started_again(
    tmp_path: Path, code: str, sentence: str
) -> None:
    async def scenario() -> _Rig:
        rig = _Rig(tmp_path, code)
        await rig.death()
        assert await rig.restarts.take(rig.service)
        await rig.death()
        return rig

    rig = asyncio.run(scenario())
    assert rig.warnings == [f"{sentence}; it is started again (1 of {len(PAUSES_S)})"]
    assert [(restart.name, restart.reason) for restart in rig.restarts.made] == [("reward", sentence)]


@pytest.mark.parametrize("exit_code", [1, 2, 143])
def test_a_process_that_exits_with_another_code_is_not_started_again(tmp_path: Path, exit_code: int) -> None:
    async def scenario() -> _Rig:
        rig = _Rig(tmp_path, f"raise SystemExit({exit_code})")
        await rig.death()
        assert not await rig.restarts.take(rig.service)
        return rig

    rig = asyncio.run(scenario())
    assert rig.warnings == []
    assert rig.restarts.used_up("reward") == ""


def test_the_pauses_grow_and_the_budget_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = _Rig(tmp_path, KILLED)
        pauses = []
        for _ in PAUSES_S:
            await rig.death()
            pauses.append(await rig.pause())
        assert tuple(pauses) == PAUSES_S
        assert rig.restarts.used_up("reward") == f", after {len(PAUSES_S)} new starts"
        await rig.death()
        assert not await rig.restarts.take(rig.service)
        assert len(rig.restarts.made) == len(PAUSES_S)

    asyncio.run(scenario())


def test_a_process_that_ran_well_gets_its_new_starts_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = _Rig(tmp_path, KILLED)
        for _ in range(3):
            await rig.death()
            await rig.pause()
        await rig.death(after_s=HEALTHY_S)
        assert await rig.pause() == PAUSES_S[0]

    asyncio.run(scenario())


def test_a_process_that_the_launcher_killed_for_its_silence_is_started_again(tmp_path: Path) -> None:
    async def scenario() -> _Rig:
        rig = _Rig(tmp_path, "import time; time.sleep(60)")
        await rig.service.start()
        rig.service.kill("sent no heartbeats any more")
        await rig.service.wait()
        assert await rig.restarts.take(rig.service)
        await rig.service.stop(0.0)
        return rig

    rig = asyncio.run(scenario())
    assert rig.warnings[0].startswith("reward sent no heartbeats any more and was killed; it is started again")


LAUNCHER = """
import asyncio, os, sys, time
from pathlib import Path
from services.launcher.processes import ServiceProcess
from services.launcher.restarts import Restarts

SERVICE = "import time; from rollmesh.cli import _die_with_launcher as tie; tie(); print('up'); time.sleep(60)"

async def main(folder):
    service = ServiceProcess("reward", [sys.executable, "-uc", SERVICE], folder / "reward.log")
    await service.start()
    service.kill("was silent")
    await service.wait()
    service.log.write_text("")
    await Restarts(None, folder, lambda sentence: None).take(service)
    while "up" not in service.log.read_text():
        await asyncio.sleep(0.01)
    print(service._process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_process_that_was_started_again_ends_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launcher = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait(10)
    launcher.stdout.close()
    assert wait_until_unused([tmp_path / "reward.log"], 20.0) == []
