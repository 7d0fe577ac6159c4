"""`rollmesh up`: check the mesh, prepare the run folder, start Redis, then hand over to `local_run`.

::

    preflight ─► run folder ─► Redis ─► local_run: services ─► run over ─► stop in order ─► accounting, report
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rollmesh.config import ReplaySection
from rollmesh.errors import ConfigError
from rollmesh.replay.embedded import EmbeddedRedis, loading_timeout_s
from rollmesh.replay.identity import clear_run, expect_own_run, refuse_known_run
from rollmesh.rpc.channel import Address, parse_address
from services.config import MeshConfig, ScorerConfig
from services.launcher import preflight
from services.launcher.address_check import reserve_any
from services.launcher.environment import job_variables
from services.launcher.local_run import LocalRun
from services.launcher.run_folder import note_start, unusable_folder, with_run, write_requested, write_resolved


def up(config: MeshConfig, *, should_overwrite: bool) -> int:
    """Run a whole mesh to the end of its run. Return the exit code.

    Args:
        config: the configuration as the user asked.
        should_overwrite: whether an earlier run of the same name is deleted.

    Raises:
        ConfigError: the mesh cannot work; no process was started and no file was changed.
    """
    check_folder(config.run.folder, should_overwrite=should_overwrite)
    print_findings(config)
    free_name(config.run.name, config.replay, should_overwrite=should_overwrite)
    config = with_run(config, id=secrets.token_hex(8))
    folder = prepare_folder(config, should_overwrite=should_overwrite)
    print(f"  {'run':<11}{folder} · {config.training.steps} steps at most", flush=True)
    with claim_folder(folder):
        note_start(folder, after_step=None)
        return start(config, folder, is_resumed=False)


def start(config: MeshConfig, folder: Path, *, is_resumed: bool) -> int:
    """Start Redis and the services of a run, and watch the run to its end. Return the exit code.

    Args:
        config: the configuration as the user asked. Ports may be 0, which means any free port. Without `replay.url`, a
            Redis is started in ``folder``.
        folder: the run folder, claimed by this process.
        is_resumed: whether the Redis in ``folder`` has to hold the keys of this run, and of no other run.

    Raises:
        ConfigError: Redis cannot be used.
    """
    with contextlib.ExitStack() as stack:
        server = None
        if config.replay.url is None:
            directory = folder / "redis"
            server = stack.enter_context(
                EmbeddedRedis.start(directory, loading_timeout_s(directory), config.replay.memory_limit_bytes)
            )
            if is_resumed:
                assert config.run.id is not None
                expect_own_run(server.url, config.replay.timeout_s, config.run.name, config.run.id)
            config = _with_redis(config, server.url)
        config = assign_ports(config)
        write_resolved(folder, config)
        return asyncio.run(_run(config, folder, server))


async def _run(config: MeshConfig, folder: Path, server: EmbeddedRedis | None) -> int:
    # LocalRun opens a gRPC channel, and a channel belongs to the event loop that runs when the channel is made.
    return await LocalRun(config, folder, server).run()


def print_findings(config: ScorerConfig) -> None:
    """Run the checks, and print a line for each finding."""
    for finding in preflight.check(config):
        print(f"  {finding.what:<11}{finding.where} · {finding.result}", flush=True)
        if finding.warning:
            print(f"warning: {finding.warning}", file=sys.stderr, flush=True)
    for warning in config.warnings if isinstance(config, MeshConfig) else []:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if names := job_variables(os.environ):
        verb = "belongs" if len(names) == 1 else "belong"
        problem = f"{', '.join(names)} {verb} to a distributed job around this run"
        print(f"warning: {problem}; the services start without {'it' if len(names) == 1 else 'them'}", file=sys.stderr)


def free_name(name: str, section: ReplaySection, *, should_overwrite: bool) -> None:
    """Check that no keys in Redis carry the run's name. On request, clear the keys of an earlier run.

    Raises:
        ConfigError: another run of that name has keys, and that run may not be replaced or still goes on.
    """
    if section.url is None:
        return
    if not should_overwrite:
        refuse_known_run(section.url, section.timeout_s, name)
    elif clear_run(section.url, section.timeout_s, name):
        print(f"  {'replay':<11}the keys of an earlier run {name!r} were cleared", flush=True)


def check_folder(folder: Path, *, should_overwrite: bool) -> None:
    """Refuse a run folder that this run must not use.

    Raises:
        ConfigError: the folder holds other files than a run's, or an earlier run that may not be replaced or still
            goes on.
    """
    folder = folder.resolve()
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise unusable_folder(error) from error
    if not (folder / "mesh.yaml").exists():
        raise ConfigError("run.name", f"{folder} exists and is not a run folder", "choose another name")
    if not should_overwrite:
        raise ConfigError(
            "run.name",
            f"{folder} holds an earlier run",
            "choose another name, or pass --resume to go on with it or --overwrite",
        )
    with claim_folder(folder):
        pass


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold the run folder for the length of the block. The claim also ends when the process ends in any way.

    Raises:
        ConfigError: another process holds the folder.
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
    """Make the run folder, and return its path. An earlier run is replaced only on request.

    Raises:
        ConfigError: `check_folder` refuses the folder, or the folder cannot be written.
    """
    check_folder(config.run.folder, should_overwrite=should_overwrite)
    folder = config.run.folder.resolve()
    try:
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "logs").mkdir(parents=True)
        # From the first moment mesh.yaml marks the folder as a run's; the resolved configuration replaces it later.
        write_resolved(folder, config)
        write_requested(folder, config)
    except OSError as error:
        raise unusable_folder(error) from error
    return folder


def _with_redis(config: MeshConfig, url: str) -> MeshConfig:
    return config.model_copy(update={"replay": config.replay.model_copy(update={"url": url})})


def assign_ports(config: MeshConfig) -> MeshConfig:
    """Return the configuration with a free port in place of port 0, for the servers that other processes have to find.

    The rollout workers and the learner keep port 0: they choose a port themselves, and register it.
    """
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
