"""New starts of processes that end while the run goes on: which ends ask for one, when it comes, how many there are.

===========================================================  =========================
a process ...                                                is started again?
===========================================================  =========================
was ended by a signal that the launcher did not send         yes
exits with `EXIT_START_AGAIN`: it says that a new one helps  yes
fell silent, and was killed by the launcher for that         yes
exits with any other code: it has printed its reason, and    no, and the run fails
would end in the same way
===========================================================  =========================

The first new start comes at once, and the next after the `PAUSES_S`, because a fault that stays must not keep the
machine busy. A process that ran for `HEALTHY_S` gets all its new starts back. A process that ends too often fails the
run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rollmesh.errors import EXIT_START_AGAIN, RollMeshError
from rollmesh.replay.embedded import EmbeddedRedis
from services.launcher.processes import ServiceDiedError, ServiceProcess, describe_exit

PAUSES_S = (0.0, 1.0, 5.0, 10.0, 10.0)
"""The pause before each new start of one process. The process has no more new starts than this list has pauses. The
pauses are shorter than `coordinator.member_timeout_s`, so that the members outlive a new start of the coordinator."""
HEALTHY_S = 300.0
"""A process that ran for this long before it ended counts as healthy: its earlier new starts are forgotten."""


def asks_for_new_start(exit_code: int) -> bool:
    """Return whether a process that ended with ``exit_code`` is to be started again; see the table of this module."""
    return exit_code < 0 or exit_code == EXIT_START_AGAIN


@dataclass(frozen=True, slots=True)
class Restart:
    """One new start of a process, for the run's accounting.

    Attributes:
        name: the process, e.g. "rollout-0" or "redis".
        reason: how the former process ended, in one clause.
        time: when the end was noticed, in UTC, e.g. "2026-11-26T17:12:41+00:00".
    """

    name: str
    reason: str
    time: str

    def as_record(self) -> dict[str, str]:
        """Return the entry of `accounting.json`."""
        return {"process": self.name, "reason": self.reason, "time": self.time}


@dataclass
class _Budget:
    """The new starts of one process since it last ran well.

    Attributes:
        num_used: the number of new starts that were used.
        started_s: the time of the last new start, in seconds of the clock.
        due_s: the time of the new start that was promised; None where the process runs.
    """

    num_used: int = 0
    started_s: float = float("-inf")
    due_s: float | None = None


class Restarts:
    """The new starts of the processes of one run.

    Args:
        server: the run's own Redis; None where the configuration names a Redis.
        folder: the run folder.
        warn: a function that is called with one sentence for each process that is started again.
        clock: returns seconds.

    Attributes:
        made: the new starts so far.
    """

    def __init__(
        self,
        server: EmbeddedRedis | None,
        folder: Path,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._folder = folder
        self._warn = warn
        self._clock = clock
        self._budgets: dict[str, _Budget] = {}
        self.made: list[Restart] = []

    def is_due(self, name: str) -> bool:
        """Return whether the process has ended and its new start is promised."""
        return name in self._budgets and self._budgets[name].due_s is not None

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
        if not self.is_due("redis") and not self._promise("redis", what):
            raise ServiceDiedError(f"{what}{self.used_up('redis')}; its log is {log}", "redis", log)
        if not self._take_due("redis"):
            return
        try:
            await asyncio.to_thread(server.start_again)
        except RollMeshError as error:
            raise ServiceDiedError(f"{what}, and cannot be started again ({error})", "redis", log) from error

    async def take(self, service: ServiceProcess) -> bool:
        """Start a service that has ended again, now or in a later call when its pause is over.

        Returns:
            Whether the end of the service is taken care of. False means that its end does not ask for a new start, or
            that the service has ended too often.
        """
        assert service.exit_code is not None
        if not asks_for_new_start(service.exit_code):
            return False
        if not self.is_due(service.name) and not self._promise(service.name, service.end()):
            return False
        if self._take_due(service.name):
            await service.start_again()
        return True

    def used_up(self, name: str) -> str:
        """Return the clause ", after 5 new starts" for a process that has had all its new starts; else empty."""
        budget = self._budgets.get(name)
        has_none_left = budget is not None and budget.num_used == len(PAUSES_S)
        return f", after {len(PAUSES_S)} new starts" if has_none_left else ""

    def _promise(self, name: str, what: str) -> bool:
        """Plan a new start of a process that ended, and say so. Return False if the process has ended too often."""
        budget = self._budgets.setdefault(name, _Budget())
        now_s = self._clock()
        if now_s - budget.started_s >= HEALTHY_S:
            budget.num_used = 0
        if budget.num_used == len(PAUSES_S):
            return False
        pause_s = PAUSES_S[budget.num_used]
        budget.num_used += 1
        budget.due_s = now_s + pause_s
        self.made.append(Restart(name, what, datetime.now(UTC).isoformat(timespec="seconds")))
        when = f" in {pause_s:g} s" if pause_s else ""
        self._warn(f"{what}; it is started again{when} ({budget.num_used} of {len(PAUSES_S)})")
        return True

    def _take_due(self, name: str) -> bool:
        """Return whether the promised start of a process is to happen now."""
        budget, now_s = self._budgets[name], self._clock()
        if budget.due_s is None or now_s < budget.due_s:
            return False
        budget.due_s, budget.started_s = None, now_s
        return True
