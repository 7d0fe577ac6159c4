"""The reason for the end of a local run is recorded. Coordinator and Redis are real, and the members are idle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rollmesh.aio.tether import tethered
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import Ledger
from rollmesh.types import PromptId
from services.config import MeshConfig, dump_mesh, load_mesh
from services.launcher import local_run, restarts
from services.launcher.local_run import LocalRun
from services.launcher.main import assign_ports
from services.launcher.processes import service_command
from tests.fakes.waiting import until
from tests.unit.coordinator.test_main import act_as_a_mesh
from tests.unit.launcher.conftest import tree  # noqa: F401 - a fixture

IDLE = tethered([sys.executable, "-c", "import time; time.sleep(300)"])
STUBBORN = tethered(
    [
        sys.executable,
        "-uc",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(300)",
    ]
)
MAX_STARTS = 3


class _Mesh:
    """A local run under test."""

    def __init__(self, config: MeshConfig, folder: Path, server: EmbeddedRedis) -> None:
        self.config, self.folder, self.server = config, folder, server
        self.run = LocalRun(config, folder, server)

    def pid(self, name: str) -> int:
        process = next(s for s in self.run._group._services if s.name == name)._process
        assert process is not None
        return process.pid

    async def until_started(self) -> None:
        await until(lambda: len(self.run._group._services) == 4)

    async def open_groups(self, count: int) -> None:
        redis = connect(self.server.url, 5.0)
        name = self.config.run.name
        term = int(await redis.hget(Keys(name).meta, "coordinator_term") or 0)  # type: ignore[misc]
        ledger = CoordinatorLedger(redis, name, term=term)
        await ledger.open_groups([PromptId("train", 0, index) for index in range(count)])
        await redis.aclose()

    async def num_groups(self) -> int:
        redis = connect(self.server.url, 5.0)
        try:
            return (await Ledger(redis, self.config.run.name).snapshot()).num_opened
        finally:
            await redis.aclose()

    @property
    def books(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "accounting.json").read_text())
        return content

    @property
    def page(self) -> str:
        return (self.folder / "report.md").read_text()


Blow = Callable[[_Mesh], Awaitable[None]]
End = Callable[..., tuple[int, _Mesh]]


@pytest.fixture
def end(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> End:  # noqa: F811
    """Start a mesh with idle members, call ``blow``, and wait for the end. Return the exit code and the mesh.

    ``member`` is the program of each member. Further arguments replace sections of the mesh file.
    """

    def run(blow: Blow, member: list[str] = IDLE, **sections: Any) -> tuple[int, _Mesh]:
        def command(service: str, name: str, config: Path) -> list[str]:
            return service_command(service, name, config) if service == "coordinator" else member

        monkeypatch.setattr(local_run, "service_command", command)
        monkeypatch.setattr(restarts, "PAUSES_S", (0.0,) * MAX_STARTS)
        folder = tmp_path / "runs" / "tiny"
        (folder / "logs").mkdir(parents=True)
        path = folder / "mesh.yaml"
        path.write_text(json.dumps({**tree, **sections}))

        async def scenario(server: EmbeddedRedis) -> tuple[int, _Mesh]:
            config = load_mesh(path, [f"replay.url={server.url}"])
            config = assign_ports(config)
            path.write_text(dump_mesh(config))
            mesh = _Mesh(config, folder, server)
            ending = asyncio.create_task(mesh.run.run())
            await mesh.until_started()
            await blow(mesh)
            return await ending, mesh

        with EmbeddedRedis.start(folder / "redis") as server:
            return asyncio.run(asyncio.wait_for(scenario(server), 100))

    return run


@pytest.mark.parametrize("victim", ["rollout-0", "coordinator"])
def test_a_process_that_is_killed_too_often_is_named_and_the_groups_are_accounted_for(
    victim: str,
    end: End,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def kill(mesh: _Mesh) -> None:
        await mesh.open_groups(3)
        async for _ in _deaths(lambda: mesh.pid(victim)):
            pass

    exit_code, mesh = end(kill)
    assert exit_code == 1
    assert [restart["process"] for restart in mesh.books["restarts"]] == [victim] * MAX_STARTS
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {victim}")
    assert "was killed by SIGKILL" in errors[0]
    books = mesh.books
    assert (books["state"], books["first_cause"]["process"]) == ("failed", victim)
    assert errors[0] == f"error: {books['reason']}"
    assert books["num_opened"] == 3
    assert books["checkpoint"] is None
    if victim == "rollout-0":  # the coordinator lives, and is told why it has to end
        log = (mesh.folder / "logs" / "coordinator.log").read_text()
        assert log.splitlines()[-1] == f"error: the run failed: {books['reason']}"
    assert "| the run | failed |" in mesh.page
    assert "3 groups opened = 0 trained" in mesh.page


async def _deaths(pid: Callable[[], int]) -> AsyncIterator[None]:
    """Kill a process, and each process that takes its place; yields each time that one has. None follows the last."""
    for _ in range(MAX_STARTS):
        former = pid()
        os.kill(former, signal.SIGKILL)
        await until(lambda: pid() != former)  # noqa: B023 - awaited before the next
        yield
    os.kill(pid(), signal.SIGKILL)


def test_redis_is_started_again_on_its_files_a_few_times(
    end: End,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def kill(mesh: _Mesh) -> None:
        await mesh.open_groups(3)
        async for _ in _deaths(lambda: mesh.server.pid):
            await until(lambda: mesh.server.is_running)
            assert await mesh.num_groups() == 3

    exit_code, mesh = end(kill)
    assert exit_code == 1
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: redis (pid ")]
    assert [line.rpartition(", ")[2] for line in warnings] == [
        f"was killed by SIGKILL; it is started again ({number} of {MAX_STARTS})" for number in (1, 2, 3)
    ]
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "was killed by SIGKILL, after 3 new starts; its log is" in error
    books = mesh.books
    assert (books["state"], books["first_cause"]["process"], books["num_opened"]) == ("failed", "redis", 3)


def test_a_scorer_that_is_killed_is_started_again_a_few_times(
    end: End,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def kill(mesh: _Mesh) -> None:
        async for _ in _deaths(lambda: mesh.pid("reward")):
            pass

    exit_code, mesh = end(kill)
    assert exit_code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [
        f"warning: reward was killed by SIGKILL; it is started again ({number} of {MAX_STARTS})" for number in (1, 2, 3)
    ]
    assert mesh.books["first_cause"]["process"] == "reward"
    assert mesh.books["reason"].startswith(f"reward was killed by SIGKILL, after {MAX_STARTS} new starts; its log is")
    assert [r["process"] for r in mesh.books["restarts"]] == ["reward"] * MAX_STARTS
    assert mesh.page.count("| started again |") == MAX_STARTS


def test_a_hangup_ends_a_run_in_order(
    end: End,
) -> None:
    async def hang_up(mesh: _Mesh) -> None:
        await mesh.open_groups(3)
        os.kill(os.getpid(), signal.SIGHUP)

    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        exit_code, mesh = end(hang_up)
    finally:
        signal.signal(signal.SIGHUP, former)
    assert exit_code == 128 + signal.SIGHUP
    assert (mesh.books["state"], mesh.books["num_opened"]) == ("interrupted", 3)
    assert "told to stop by SIGHUP" in mesh.page


def test_a_second_signal_kills_all_services_at_once(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_run, "STOP_S", 1000.0)
    pids: list[int] = []

    async def interrupt_twice(mesh: _Mesh) -> None:
        await mesh.open_groups(3)
        pids.extend(mesh.pid(name) for name in ("coordinator", "reward", "rollout-0", "learner"))
        for name in ("reward", "rollout-0", "learner"):
            await until((mesh.folder / "logs" / f"{name}.log").read_text)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: mesh.run.is_stopping)
        os.kill(os.getpid(), signal.SIGINT)

    exit_code, mesh = end(interrupt_twice, member=STUBBORN)
    assert exit_code == 128 + signal.SIGINT
    assert (mesh.books["state"], mesh.books["num_opened"]) == ("interrupted", 3)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_signal_while_members_have_still_to_end_is_heard_at_once(
    end: End,
) -> None:
    async def finish_and_interrupt(mesh: _Mesh) -> None:
        await act_as_a_mesh(mesh.config, "")
        await until(lambda: mesh.run.is_finishing)
        os.kill(os.getpid(), signal.SIGINT)

    training = {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2}
    exit_code, mesh = end(finish_and_interrupt, training=training)
    assert exit_code == 128 + signal.SIGINT
    assert mesh.books["state"] == "interrupted"
    assert "rollout-0, learner had still to end" in mesh.books["reason"]
