"""The service processes of a local mesh: started with a log file each, watched, ended in order.

A service leads a session of its own, so that Ctrl-C in the terminal reaches the launcher alone, and is told to end
with the launcher (`ROLLMESH_LAUNCHER_PID`). What it prints last on stderr as ``error: ...`` is why it died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollmesh.errors import RollMeshError

TAIL_BYTES = 16_384


class ServiceDiedError(RollMeshError):
    """A service ended that should not have."""


@dataclass
class ServiceProcess:
    """One service of the mesh as a child process."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    stage: int = 0
    """Services use those of lower stages, and are ended before them."""
    _process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "ROLLMESH_LAUNCHER_PID": str(os.getpid()),
            **self.environment,
        }
        with self.log.open("ab") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before it started."""
        return None if self._process is None else self._process.returncode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then after ``timeout_s`` SIGKILL to everything in its session."""
        if self._process is None:
            return
        if self.is_running:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), timeout_s)
        # Also after an orderly end: an engine or rank that the service left behind is in its process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def failure(self) -> str:
        """One sentence: how it ended, and the last error it printed."""
        code = self.exit_code
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
        reason = self._last_error()
        return f"{self.name} {how}: {reason}" if reason else f"{self.name} {how}; see {self.log}"

    def _last_error(self) -> str:
        with self.log.open("rb") as source:
            source.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = source.read().decode(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else ""


def service_command(service: str, name: str, config: Path) -> list[str]:
    return [sys.executable, "-m", "rollmesh.cli", service, "--config", str(config), "--name", name]


class ProcessGroup:
    """The services of one run, in the order in which they are started."""

    def __init__(self) -> None:
        self._services: list[ServiceProcess] = []

    async def start(self, service: ServiceProcess) -> None:
        self._services.append(service)
        await service.start()

    def first_failure(self) -> ServiceProcess | None:
        """A service that ended with anything but success; the one that says why comes before one that does not."""
        dead = [s for s in self._services if s.exit_code not in (None, 0)]
        return min(dead, key=lambda s: not s._last_error(), default=None)

    def ended(self) -> list[ServiceProcess]:
        return [s for s in self._services if s.exit_code is not None]

    async def wait_all(self, names: Sequence[str], timeout_s: float) -> list[str]:
        """Wait for services to end by themselves; returns the names of those that did not."""
        waiting = [s for s in self._services if s.name in names and s.is_running]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(s.wait() for s in waiting)), timeout_s)
        return [s.name for s in waiting if s.is_running]

    async def stop_all(self, timeout_s: float) -> None:
        """End everything, the highest stage first: those who use a service before the service."""
        for stage in sorted({service.stage for service in self._services}, reverse=True):
            await asyncio.gather(*(s.stop(timeout_s) for s in self._services if s.stage == stage))
