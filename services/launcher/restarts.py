"""New starts of processes that die while the run goes on: of Redis, the reward server and the reference.

Nothing is lost by such a death. Redis loads its files. A sample that waits for its score or its log-probabilities is
sent to the new process. Each process is started again at most `MAX_STARTS` times in a run, because a process that has
died that often will die again. A service that ended with an exit code is not started again: it has printed its reason,
and would end in the same way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rollmesh.errors import RollMeshError
from rollmesh.replay.embedded import EmbeddedRedis
from services.launcher.processes import ServiceDiedError, ServiceProcess, describe_exit

MAX_STARTS = 3
"""The number of new starts that one process may have in a run."""
SCORERS = ("reward", "reference")


class Restarts:
    """The new starts of the processes of one run.

    Args:
        server: the run's own Redis; None where the configuration names a Redis.
        folder: the run folder.
        warn: a function that is called with one sentence for each process that is started again.
    """

    def __init__(self, server: EmbeddedRedis | None, folder: Path, warn: Callable[[str], None]) -> None:
        self._server = server
        self._folder = folder
        self._warn = warn
        self._num_starts: Counter[str] = Counter()

    async def keep_redis(self) -> None:
        """Start the run's own Redis again if it died, and wait until it answers.

        Raises:
            ServiceDiedError: Redis died too often, or cannot be started again.
        """
        server = self._server
        if server is None or server.is_running:
            return
        log = self._folder / "redis" / "server.log"
        what = f"redis (pid {server.pid}), which holds the replay queue, {describe_exit(server.exit_code)}"
        if not self._may_start("redis"):
            raise ServiceDiedError(f"{what}, after {MAX_STARTS} new starts; its log is {log}", "redis", log)
        self._say_started(what, "redis")
        try:
            await asyncio.to_thread(server.start_again)
        except RollMeshError as error:
            raise ServiceDiedError(f"{what}, and cannot be started again ({error})", "redis", log) from error

    async def start_again(self, service: ServiceProcess) -> bool:
        """Start ``service`` again if it is a scorer that a signal ended. Return whether it was started again.

        A scorer that has had `MAX_STARTS` new starts is not started again.
        """
        was_killed = service.exit_code is not None and service.exit_code < 0
        if service.name not in SCORERS or not was_killed or not self._may_start(service.name):
            return False
        self._say_started(f"{service.name} {describe_exit(service.exit_code)}", service.name)
        await service.start_again()
        return True

    def _may_start(self, name: str) -> bool:
        return self._num_starts[name] < MAX_STARTS

    def _say_started(self, what: str, name: str) -> None:
        self._num_starts[name] += 1
        self._warn(f"{what}; it is started again ({self._num_starts[name]} of {MAX_STARTS})")
