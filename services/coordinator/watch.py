"""The clock of the run: what ends because time passes.

Once a second: leases are renewed or expire, silent members are dropped, a run in which too many groups fail is stopped,
and so is one that does not move. Everything here is also bounded elsewhere or harmless when late; a second is fine.

What the coordinator itself slept through (a suspended machine, a frozen container, SIGSTOP) is no time of the run:
members get their whole timeout anew, and leases that ended meanwhile count as no failed attempt.
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
from rollmesh.replay.ledger import Ledger, LedgerSnapshot
from rollmesh.types import RunState
from services.coordinator.admission import failed_too_often
from services.coordinator.coordinator import Coordinator
from services.coordinator.members import Clock
from services.coordinator.waiting import waiting_for

logger = logging.getLogger(__name__)

TICK_S = 1.0
CLOCK_S = 0.5
ASLEEP_S = 3.0
"""A coordinator that did nothing for so long was stopped."""


class StallClock:
    """How long something has stayed the same."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: Hashable = None
        self._since_s = clock()

    def observe(self, state: Hashable) -> float:
        """Seconds since ``state`` last changed."""
        if state != self._last:
            self._last, self._since_s = state, self._clock()
        return self._clock() - self._since_s


class Watch:
    """Consumes time; produces expiries and failures; waits for the next tick only.

    Args:
        coordinator: what is watched.
        ledger: of the run.
        max_failed_fraction: of the groups that ended; above it the run fails.
        groups_per_batch: so many must have FAILED for that.
        stall_timeout_s: without any progress for so long, the run fails, unless a member asks for more patience.
        clock: the coordinator's, read here often enough to notice its sleep.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        ledger: Ledger,
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
        """A tick may wait for Redis, and that is no sleep."""
        while True:
            self._clock()
            await asyncio.sleep(CLOCK_S)

    async def tick(self) -> None:
        """One look at everything."""
        coordinator = self._coordinator
        if slept_s := self._clock.take_slept_s():
            logger.warning("the coordinator was stopped for %.0f s; all members get their time anew", slept_s)
            coordinator.members.give_time()
            self._has_slept = True
        coordinator.expire_evaluation()
        await coordinator.drop_silent()
        with contextlib.suppress(UnavailableError):
            # The dispatcher reports an unreachable Redis; leases that are overdue are dead to commits all the same.
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
