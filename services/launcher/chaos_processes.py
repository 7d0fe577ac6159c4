"""The processes of a running mesh, found from its run folder (Linux).

A process belongs to a run if it was started as ``rollmesh SERVICE --config RUN/mesh.yaml``, or is a child of such a
process. The Redis of the run works in the folder ``RUN/redis``. Each process is found anew for each action: a process
that was started again has another id. Processes of other users are left out.

=================== =========================================================
name                processes
=================== =========================================================
``up``              `rollmesh up` or `rollmesh resume`, which started the run
``coordinator``     the service; so are ``reward`` and ``reference``
``rollout-0``       the rollout worker, without its engine
``rollout-0:engine`` the processes of the worker's vLLM
``learner``         the learner; with several ranks, all ranks and their launcher
``learner:rank-1``  one rank of several
``redis``           the run's own Redis
=================== =========================================================
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.launcher.processes import LAUNCHER_VARIABLE

PROC = Path("/proc")
_MODULE = "rollmesh.cli"
_RANK_LAUNCHER = "torch.distributed.run"
_SERVERS = ("redis-server", "valkey-server")
_ENGINE_TITLE = "VLLM::"
"""The beginning of the title that vLLM gives to its processes."""


@dataclass(frozen=True, slots=True)
class FoundProcess:
    """A process as /proc shows it.

    Attributes:
        pid: the process id.
        parent: the id of the parent.
        started: the time of the start in ticks since boot. Together with ``pid`` it names one process for ever.
        arguments: the command line, or the title that the process gave itself.
    """

    pid: int
    parent: int
    started: int
    arguments: tuple[str, ...]

    def send(self, number: signal.Signals) -> bool:
        """Send a signal. Return False where the process has ended, also where another process has its id now."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            now = read_process(self.pid)
            if now is None or now.started != self.started:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def read_process(pid: int) -> FoundProcess | None:
    """Return a process of this user that has not ended; None for any other process id."""
    folder = PROC / str(pid)
    try:
        if folder.stat().st_uid != os.getuid():
            return None
        state, parent, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
        arguments = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return None
    return None if state in "ZX" else FoundProcess(pid, int(parent), int(fields[17]), tuple(arguments))


def find_processes(folder: Path) -> dict[str, list[FoundProcess]]:
    """Return the processes of the run in ``folder`` by their names. A name without a process is left out."""
    folder = folder.resolve()
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    running = {process.pid: process for pid in pids if (process := read_process(pid)) is not None}
    services = [process for process in running.values() if _config_of(process) == folder / "mesh.yaml"]
    found: dict[str, list[FoundProcess]] = defaultdict(list)
    for process in services:
        name = _member_name(process)
        found[name].append(process)
        if (rank := _environment(process.pid).get("RANK")) is not None:
            found[f"{name}:rank-{rank}"].append(process)
        if engine := [child for child in _below(process, running) if child.arguments[0].startswith(_ENGINE_TITLE)]:
            found[f"{name}:engine"] = engine
    if server := [process for process in running.values() if _is_server_of(process, folder / "redis")]:
        found["redis"] = server
    if launcher := next(_launchers([*services, *server], running), None):
        found["up"] = [launcher]
    return dict(sorted(found.items()))


def _config_of(process: FoundProcess) -> Path | None:
    """Return the mesh file of a service process; None for another process.

    The module has to be the first program on the command line: a keeper has the whole command of its service behind
    its own.
    """
    arguments = process.arguments
    program = _module_of(arguments)
    if program is None or "--config" not in arguments:
        return None
    place = arguments.index("--config") + 1
    with contextlib.suppress(OSError, IndexError):
        return (PROC / str(process.pid) / "cwd").resolve().joinpath(arguments[place]).resolve()
    return None


def _module_of(arguments: Sequence[str]) -> str | None:
    """Return the module that Python runs, if that is a service or the launcher of the learner's ranks."""
    for argument, following in itertools.pairwise(arguments[1:]):
        if argument == "-m":
            return following if following in (_MODULE, _RANK_LAUNCHER) else None
        if not argument.startswith("-") or argument == "-c":
            return None
    return None


def _member_name(process: FoundProcess) -> str:
    """Return the value of ``--name``; without it, the service, which follows the module on the command line."""
    arguments = process.arguments
    if "--name" in arguments[:-1]:
        return arguments[arguments.index("--name") + 1]
    service = arguments[arguments.index(_MODULE) + 1]
    return "rollout-0" if service == "rollout" else service


def _environment(pid: int) -> Mapping[str, str]:
    """Return the environment with which a process was started; empty where the process has ended."""
    try:
        text = (PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.partition("=")[::2] for entry in text.split("\0"))


def _below(process: FoundProcess, running: Mapping[int, FoundProcess]) -> Iterator[FoundProcess]:
    """Yield the descendants of a process."""
    for child in running.values():
        if child.parent == process.pid:
            yield child
            yield from _below(child, running)


def _is_server_of(process: FoundProcess, directory: Path) -> bool:
    """Return whether a process is the Redis that works in ``directory``."""
    with contextlib.suppress(OSError):
        folder = PROC / str(process.pid)
        program = (folder / "comm").read_text().strip()
        return program in _SERVERS and (folder / "cwd").resolve() == directory
    return False


def _launchers(services: Sequence[FoundProcess], running: Mapping[int, FoundProcess]) -> Iterator[FoundProcess]:
    """Yield the launcher that started each of the services, while the launcher is alive.

    A service has the launcher's id in its environment. The launcher has to be an ancestor of the service, because a
    launcher that died may have left its id to another process.
    """
    for service in services:
        launcher = int(_environment(service.pid).get(LAUNCHER_VARIABLE, 0))
        ancestor = running.get(service.parent)
        while ancestor is not None:
            if ancestor.pid == launcher:
                yield ancestor
            ancestor = running.get(ancestor.parent)
