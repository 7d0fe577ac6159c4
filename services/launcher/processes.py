"""The service processes of a local mesh. Each has a log file; the launcher starts, watches and ends them in order.

A service leads a session of its own, so that Ctrl-C in the terminal reaches the launcher alone. The variable
`ROLLMESH_LAUNCHER_PID` tells the service to end with the launcher. The last line ``error: ...`` that a service prints
on stderr says why the service died.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollmesh.errors import RollMeshError
from services.launcher.environment import service_environment

TAIL_BYTES = 65_536
"""The part of a log, from its end, in which the reason of a death is looked for."""
LAUNCHER_VARIABLE = "ROLLMESH_LAUNCHER_PID"
_POLL_S = 0.1
_CAUSES = ("error: ", "Fatal Python error: ")
"""The first words of a line that says why a process ended: of our own lines, and of Python's fault handler."""


class ServiceDiedError(RollMeshError):
    """A process of the mesh that ended too early, or stopped answering.

    Args:
        message: one sentence that says what happened.
        culprit: the name of the process; empty where the message names no process.
        log: the log file of the process; None where ``culprit`` is empty.
    """

    def __init__(self, message: str, culprit: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit
        self.log = log


@dataclass
class ServiceProcess:
    """One service of the mesh as a child process.

    Attributes:
        name: the member's name, e.g. "rollout-0".
        command: the program and its arguments.
        log: the file that gets the output of the process.
        environment: variables that are set beside those of `service_environment`.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    stage: int = 0
    """A service uses services of lower stages, and is ended before they are."""
    has_ranks: bool = False
    """Whether several ranks of the service write its log."""
    silence: str = ""
    """Why the launcher killed the process, e.g. "has been silent for 30 s"; empty where the launcher did not."""
    started_at: float = 0.0
    """The time at which the process was started, in monotonic seconds."""
    ended_at: float | None = None
    """The time at which the process ended, in monotonic seconds; None before that."""
    _log_start: int = 0
    """The size of the log in bytes before this process wrote to the log."""
    _process: asyncio.subprocess.Process | None = None
    _watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process. Its output is added at the end of the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started_at = time.monotonic()
        environment = {**service_environment(os.environ), LAUNCHER_VARIABLE: str(os.getpid()), **self.environment}
        with self.log.open("ab") as sink:
            self._log_start = sink.tell()
            _lock(sink.fileno())
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
        self._watch = asyncio.create_task(self._note_end(), name=f"end of {self.name}")

    async def start_again(self) -> None:
        """Start a new process after the process ended. Everything that the old process left behind is killed first."""
        await self.stop(0.0)
        self.ended_at, self.silence = None, ""
        await self.start()

    async def _note_end(self) -> None:
        await self.wait()
        self.ended_at = time.monotonic()

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the number of the signal; None until the process has ended."""
        return None if self._process is None else self._process.returncode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """Send SIGTERM to the service. When it has ended, or after ``timeout_s``, send SIGKILL to its process group."""
        if self._process is None:
            return
        if self.is_running:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), timeout_s)
        # Also after an orderly end: the process group holds engines and ranks that the service left behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def kill(self, silence: str = "") -> None:
        """Send SIGKILL to the process group of the service, and return at once.

        Args:
            silence: what the service failed to do, for a service that is to be started again.
        """
        if self._process is None:
            return
        self.silence = silence
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Return how the process ended and which error it printed, e.g. "rollout-0 exited with 75: vLLM has died"."""
        how = f"{self.silence} and was killed" if self.silence else describe_exit(self.exit_code)
        return f"{self.name} {how}" + (f": {reason}" if (reason := self._error()) else "")

    def failure(self, suffix: str = "") -> str:
        """Return one sentence that says how the process ended, which error it printed, and where its log is.

        Args:
            suffix: a clause that is added to how the process ended.
        """
        return f"{self.end()}{suffix}; its log is {self.log}"

    def _error(self) -> str:
        """Return the last error that the process printed; empty where it printed none.

        Where several ranks write the log, return the first error: the later ranks ended because they lost a peer.
        """
        with self.log.open("rb") as source:
            source.seek(max(self._log_start, self.log.stat().st_size - TAIL_BYTES))
            lines = source.read().decode(errors="replace").splitlines()
        errors = [line.partition(": ")[2] for line in lines if line.startswith(_CAUSES)]
        return errors[0 if self.has_ranks else -1] if errors else ""


def _lock(log: int) -> bool:
    """Lock an open log for this process and for all processes that inherit the descriptor.

    Return whether that succeeded: False means that other processes hold the lock.
    """
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_in_use(log: Path) -> bool:
    """Return whether a process that writes ``log`` still runs: a service, or a process that the service started."""
    with log.open("rb") as source:
        return not _lock(source.fileno())


def wait_until_unused(logs: Sequence[Path], timeout_s: float) -> list[Path]:
    """Wait up to ``timeout_s`` for the processes that write these logs. Return the logs that are still written.

    The launcher that started the processes may have been killed. Therefore the locks on the logs are watched: a lock
    ends with the last process that writes the log.
    """
    deadline = time.monotonic() + timeout_s
    while (used := [log for log in logs if is_in_use(log)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return used


def describe_exit(code: int | None) -> str:
    """Return how a process ended, e.g. "was killed by SIGKILL" for the exit code -9."""
    if code is None or code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have no name of their own
        return f"was killed by signal {-code}"


def service_command(service: str, name: str, config: Path) -> list[str]:
    """Return the command line that starts ``service`` as the member ``name``, with the mesh file ``config``."""
    return [sys.executable, "-P", "-m", "rollmesh.cli", service, "--config", str(config), "--name", name]


class ProcessGroup:
    """The services of one run, in the order in which they are started."""

    def __init__(self) -> None:
        self._services: list[ServiceProcess] = []

    async def start(self, service: ServiceProcess) -> None:
        self._services.append(service)
        await service.start()

    def failures(self) -> list[ServiceProcess]:
        """Return the services that ended without success, the first to end first.

        Services that ended later may have ended because of an earlier one.
        """
        dead = [s for s in self._services if s.exit_code not in (None, 0)]
        return sorted(dead, key=lambda s: s.ended_at or time.monotonic())

    def running(self) -> list[ServiceProcess]:
        """Return the services whose processes run."""
        return [s for s in self._services if s.is_running]

    def ended(self) -> list[ServiceProcess]:
        """Return the services that have ended, with or without success."""
        return [s for s in self._services if s.exit_code is not None]

    async def wait_all(self, names: Sequence[str], timeout_s: float) -> None:
        """Wait for the named services to end by themselves, at most for ``timeout_s``."""
        waiting = [s for s in self._services if s.name in names and s.is_running]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(s.wait() for s in waiting)), timeout_s)

    def kill_all(self) -> None:
        """Send SIGKILL to the process groups of all services."""
        for service in self._services:
            service.kill()

    async def stop_all(self, timeout_s: float) -> None:
        """End all services, the highest stage first. So a service ends after the services that use it."""
        for stage in sorted({service.stage for service in self._services}, reverse=True):
            await asyncio.gather(*(s.stop(timeout_s) for s in self._services if s.stage == stage))
