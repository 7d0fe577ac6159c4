"""`rollmesh up`, read top to bottom: check, prepare, start, watch, stop, report.

::

    preflight ─► run folder ─► Redis ─► coordinator ─► reward, reference, rollout-*, learner
                                            │ status, once a second
                                            ▼
                                   progress line ─► run over ─► stop in order ─► report

Consumes the coordinator's status; waits for nothing without a deadline. Any service that ends before the run is over
ends the run, with that service's last error as the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rollmesh.errors import ConfigError, RollMeshError
from rollmesh.replay.server import EmbeddedServer
from rollmesh.rpc.channel import Address, parse_address
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import MeshStatus, RunState
from services.config import MeshConfig, dump_mesh
from services.launcher import preflight
from services.launcher.address_check import reserve_any
from services.launcher.processes import ProcessGroup, ServiceDiedError, ServiceProcess, service_command
from services.launcher.progress import ProgressLine
from services.launcher.report import read_json, write_report

COORDINATOR_START_S = 30.0
LEAVE_S = 60.0
"""Time for services to end by themselves once the run is over (the learner may be exporting)."""
STOP_S = 15.0
"""Time for one service to end after SIGTERM."""
STATUS_SILENCE_S = 30.0
"""The coordinator may fail to answer for so long before the run is given up."""
EARLY_END_S = 10.0
"""A service may end so long before the coordinator says that the run is over."""
STAGES = {"coordinator": 0, "reward": 1, "reference": 1, "rollout": 2, "learner": 2}
"""Who uses whom: the end goes from the highest down."""
EXIT_INTERRUPTED = 128 + signal.SIGINT


def up(config: MeshConfig, *, should_overwrite: bool) -> int:
    """Run a whole mesh; returns the exit code.

    Raises:
        ConfigError: it cannot work; nothing was started and nothing was changed.
    """
    check_folder(config, should_overwrite=should_overwrite)
    print_findings(config)
    folder = prepare_folder(config, should_overwrite=should_overwrite)
    print(f"  {'run':<11}{folder} · {config.training.steps} steps at most", flush=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claim_folder(folder))
        if config.replay.url is None:
            server = stack.enter_context(EmbeddedServer.start(folder / "redis"))
            config = _with_redis(config, server.url)
        config = assign_ports(config)
        (folder / "mesh.yaml").write_text(dump_mesh(config), encoding="utf-8")
        return asyncio.run(_run(config, folder))


async def _run(config: MeshConfig, folder: Path) -> int:
    # Made here because its gRPC channel belongs to the loop that runs when it is made.
    return await _Launcher(config, folder).run()


def print_findings(config: MeshConfig) -> None:
    """Run the checks and show, line by line, what they find."""
    for finding in preflight.check(config):
        print(f"  {finding.what:<11}{finding.where} · {finding.result}", flush=True)
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def check_folder(config: MeshConfig, *, should_overwrite: bool) -> None:
    """Refuse a run folder that is not ours to use.

    Raises:
        ConfigError: it is something else, or holds an earlier run that is not to be replaced or still goes on.
    """
    folder = config.run.folder.resolve()
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise _unusable(error) from error
    if not (folder / "mesh.yaml").exists():
        raise ConfigError("run.name", f"{folder} exists and is not a run folder", "choose another name")
    if not should_overwrite:
        raise ConfigError("run.name", f"{folder} holds an earlier run", "choose another name or pass --overwrite")
    with claim_folder(folder):
        pass


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold the run folder as long as this process uses it; the claim ends with the process, however that ends.

    Raises:
        ConfigError: another process holds it.
    """
    lock = os.open(folder / "mesh.yaml", os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"{folder} belongs to a run that still goes on"
            raise ConfigError("run.name", problem, "choose another name or end that run") from error
        yield
    finally:
        os.close(lock)


def prepare_folder(config: MeshConfig, *, should_overwrite: bool) -> Path:
    """Make the run folder. An earlier run is only replaced on request, and only if it is a run folder.

    Raises:
        ConfigError: see `check_folder`; or nothing can be written there.
    """
    check_folder(config, should_overwrite=should_overwrite)
    folder = config.run.folder.resolve()
    try:
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "logs").mkdir(parents=True)
        # Marks the folder as a run's from the first moment; the resolved configuration replaces it.
        (folder / "mesh.yaml").write_text(dump_mesh(config), encoding="utf-8")
    except OSError as error:
        raise _unusable(error) from error
    return folder


def _unusable(error: OSError) -> ConfigError:
    problem = f"{error.filename} cannot be used for the run folder ({error.strerror})"
    return ConfigError("run.directory", problem, "name a folder that can be written")


def _with_redis(config: MeshConfig, url: str) -> MeshConfig:
    return config.model_copy(update={"replay": config.replay.model_copy(update={"url": url})})


def assign_ports(config: MeshConfig) -> MeshConfig:
    """Replace port 0 of the servers that others have to find. Rollout workers and the learner register theirs."""
    servers = ["coordinator"]
    if config.reward.function:
        servers.append("reward")
    if config.has_reference:
        servers.append("reference")
    updates = {}
    with contextlib.ExitStack() as held:
        for server in servers:
            section = getattr(config, server)
            place = f"{server}.address"
            wanted = parse_address(section.address, place)
            if wanted.port == 0:
                listener = held.enter_context(reserve_any(place, wanted.host))
                address = Address(wanted.host, listener.getsockname()[1])
                updates[server] = section.model_copy(update={"address": str(address)})
    return config.model_copy(update=updates)


def member_names(config: MeshConfig) -> list[str]:
    """The members that are started here, in that order."""
    names = ["reward"] if config.reward.function else []
    names += ["reference"] if config.has_reference else []
    return [*names, *(f"rollout-{index}" for index in range(config.rollout.num_workers)), "learner"]


class _Launcher:
    """One run of a local mesh."""

    def __init__(self, config: MeshConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._config_path = folder / "mesh.yaml"
        self._group = ProcessGroup()
        self._client = CoordinatorClient(config.coordinator.address, "launcher", "launcher")
        self._progress = ProgressLine(sys.stderr, member_names(config))
        self._interrupted = asyncio.Event()
        self._last_answer = time.monotonic()
        self._first_end: float | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        exit_code = 1
        try:
            await self._start_all()
            status = await self._watch()
            exit_code = await self._conclude(status)
        except RollMeshError as error:
            self._progress.finish()
            print(f"error: {error}", file=sys.stderr, flush=True)
        finally:
            await self._stop()
        self._report()
        return exit_code

    def _interrupt(self) -> None:
        if self._interrupted.is_set():
            os.write(2, b"\nstill stopping; services that do not answer are killed\n")
        self._interrupted.set()

    async def _start_all(self) -> None:
        await self._start("coordinator", "coordinator")
        await self._wait_for_coordinator()
        for name in member_names(self._config):
            await self._start(name.partition("-")[0], name)

    async def _start(self, service: str, name: str) -> None:
        command = service_command(service, name, self._config_path)
        log = self._folder / "logs" / f"{name}.log"
        await self._group.start(ServiceProcess(name, command, log, stage=STAGES[service]))

    async def _wait_for_coordinator(self) -> None:
        deadline = time.monotonic() + COORDINATOR_START_S
        while not self._interrupted.is_set():
            self._raise_if_dead()
            if await self._status() is not None:
                return
            if time.monotonic() > deadline:
                raise ServiceDiedError(
                    f"coordinator does not answer on {self._config.coordinator.address} after "
                    f"{COORDINATOR_START_S:.0f} s; see {self._folder / 'logs' / 'coordinator.log'}"
                )
            await asyncio.sleep(0.1)

    async def _status(self) -> MeshStatus | None:
        try:
            status = await self._client.status()
        except RollMeshError:
            return None
        self._last_answer = time.monotonic()
        return status

    def _raise_if_dead(self) -> None:
        failed = self._group.first_failure()
        if failed is not None:
            raise ServiceDiedError(failed.failure())

    def _raise_if_left_early(self) -> None:
        """A service that ended well although the run goes on; at the run's end the last status may lag behind."""
        ended = self._group.ended()
        if not ended:
            self._first_end = None
            return
        self._first_end = self._first_end or time.monotonic()
        if time.monotonic() - self._first_end > EARLY_END_S:
            raise ServiceDiedError(f"{ended[0].name} ended although the run goes on; see {ended[0].log}")

    async def _watch(self) -> MeshStatus | None:
        """Show progress until the run is over; None if it was interrupted."""
        while not self._interrupted.is_set():
            status = await self._status()
            if status is not None:
                self._progress.show(status)
                if status.run_state.is_over:
                    self._progress.finish()
                    return status
            self._raise_if_dead()
            self._raise_if_left_early()
            if time.monotonic() - self._last_answer > STATUS_SILENCE_S:
                raise ServiceDiedError(f"coordinator has not answered for {STATUS_SILENCE_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._interrupted.wait(), 1.0)
        self._progress.finish()
        return None

    async def _conclude(self, status: MeshStatus | None) -> int:
        if status is None:
            print("interrupted: stopping the services in order", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        if status.run_state is RunState.FAILED:
            raise ServiceDiedError(" ".join(status.failure.split()))
        late = await self._group.wait_all(member_names(self._config), LEAVE_S)
        if late:
            print(f"warning: {', '.join(late)} did not end in {LEAVE_S:.0f} s", file=sys.stderr, flush=True)
        self._raise_if_dead()
        return 0

    async def _stop(self) -> None:
        await self._group.stop_all(STOP_S)
        await self._client.close()

    def _report(self) -> None:
        if shortfall := read_json(self._folder / "accounting.json").get("shortfall"):
            print(f"warning: {shortfall}", file=sys.stderr, flush=True)
        if (self._folder / "metrics.jsonl").exists():
            path = write_report(self._folder)
            print(f"report: {path}", flush=True)
        else:
            print(f"logs: {self._folder / 'logs'}", file=sys.stderr, flush=True)
