"""The clock of the run: the watch ends leases, members and runs whose time is up.

Once a second the watch renews or expires leases, drops silent members, and stops a run in which too many groups fail or
nothing moves. A second is often enough: each of these ends has another bound as well, or may come late without harm.

While the coordinator itself sleeps (a suspended machine, a frozen container, SIGSTOP), no time of the run passes: after
the sleep, members get their whole timeout anew, and leases that ended meanwhile do not count as failed attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Hashable

from rollmesh.aio.awake import AwakeClock
from rollmesh.aio.supervisor import Supervisor
from rollmesh.errors import UnavailableError
from rollmesh.replay.accounting import most_frequent_failure
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.ledger import LedgerSnapshot
from rollmesh.types import RunState
from services.coordinator.admission import failed_too_often
from services.coordinator.coordinator import Coordinator
from services.coordinator.members import Clock
from services.coordinator.waiting import waiting_for

logger = logging.getLogger(__name__)

TICK_S = 1.0
CLOCK_S = 0.5
ASLEEP_S = 3.0
"""A coordinator that read no clock for this long was asleep."""


class StallClock:
    """Measures for how long a value has stayed the same."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: Hashable = None
        self._since_s = clock()

    def observe(self, state: Hashable) -> float:
        """Return the seconds since ``state`` last changed."""
        if state != self._last:
            self._last, self._since_s = state, self._clock()
        return self._clock() - self._since_s


class Watch:
    """Ends leases, members and runs as time passes. Waits for the next tick only.

    Args:
        coordinator: the coordinator to watch.
        ledger: the run's ledger.
        max_failed_fraction: the run fails if a larger part of the groups that ended FAILED.
        groups_per_batch: the run goes on while fewer groups FAILED.
        stall_timeout_s: seconds without progress after which the run fails, unless a member asks for more patience.
        clock: the coordinator's clock. The watch reads it often enough to notice that the coordinator slept.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        ledger: CoordinatorLedger,
        max_failed_fraction: float,
        groups_per_batch: int,
        stall_timeout_s: float,
        clock: AwakeClock,
    ) -> None:
        self._clock = clock
        self._coordinator = coordinator
        self._ledger = ledger
        self._max_failed_fraction = max_failed_fraction
        self._groups_per_batch = groups_per_batch
        self._stall_timeout_s = stall_timeout_s
        self._stall = StallClock(clock)
        self._has_slept = False

    async def run(self) -> None:
        """Tick until cancelled."""
        async with Supervisor() as tasks:
            tasks.spawn(self._read_clock(), "clock")
            while True:
                await self.tick()
                await asyncio.sleep(TICK_S)

    async def _read_clock(self) -> None:
        """Read the clock while a tick waits for Redis, because this wait is no sleep."""
        while True:
            self._clock()
            await asyncio.sleep(CLOCK_S)

    async def tick(self) -> None:
        """Look once at all leases, members and groups."""
        coordinator = self._coordinator
        if slept_s := self._clock.take_slept_s():
            logger.warning("the coordinator was stopped for %.0f s; all members get their time anew", slept_s)
            coordinator.members.give_time()
            self._has_slept = True
        coordinator.expire_evaluation()
        await coordinator.drop_silent()
        with contextlib.suppress(UnavailableError):
            # The dispatcher reports that Redis cannot be reached. Redis refuses commits of overdue leases anyway.
            await coordinator.renewals.flush()
            for row in await self._ledger.expire_leases(is_excused=self._has_slept):
                logger.warning("lease of %s expired: %s", row.member, row.state.value, extra={"group": row.group_id})
            self._has_slept = False
            await self._check_failures(coordinator.dispatcher.snapshot)
        coordinator.observe()
        await self._check_stall()
        coordinator.dispatcher.wake()

    async def _check_failures(self, snapshot: LedgerSnapshot | None) -> None:
        if snapshot is None or not failed_too_often(
            snapshot.num_groups, self._max_failed_fraction, self._groups_per_batch
        ):
            return
        if self._coordinator.run.state is RunState.RUNNING:
            reason = await most_frequent_failure(self._ledger)
            self._coordinator.fail(f"too many groups failed, most often: {reason}")

    async def _check_stall(self) -> None:
        coordinator = self._coordinator
        quiet_s = self._stall.observe(coordinator.progress_mark())
        coordinator.quiet_s = quiet_s
        if quiet_s >= max(self._stall_timeout_s, coordinator.members.patience_s) and not coordinator.run.state.is_over:
            await coordinator.refresh()
            sentence = waiting_for(coordinator.view())
            coordinator.fail(f"nothing has moved for {quiet_s:.0f} s: {sentence}")
