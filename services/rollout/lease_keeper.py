"""Renews the leases of a worker while its work moves, and ends the work on a lease that is over.

::

    pool ──keep──► a lease and its time limit ──renewals──► heartbeat ──► coordinator
                              ▲                                               │
                              └── heard: renewed, the limit moves on ─────────┤
                                         over, the limit is now ──────────────┘

The keeper ends the work on a lease early for one of three reasons: the coordinator says that the lease is over, the
coordinator has answered no renewal for the lease's whole life, or the worker's work has stood still. Long work is no
reason.

The keeper judges the worker as a whole, not each group: while the engine makes tokens or samples get scores, a group
without tokens waits for its turn. A group that the engine has forgotten cannot block the run for ever: the group keeps
its slot, the mesh runs out of slots, the worker then stands still, and the keeper ends the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rollmesh.errors import RollMeshError
from rollmesh.types import Heartbeat, Lease, LeaseKey, MemberReport

RENEWED_BELOW = 2 / 3
"""The keeper renews a lease when less than this part of the lease's life is left. Some renewals may then be lost."""


class LeaseOverError(RollMeshError):
    """The lease ended before its group was complete."""


@dataclass(eq=False)
class _HeldLease:
    """A lease under way, and the time limit of the work on it.

    Attributes:
        limit: ends the work.
        ends_s: the time at which the lease ends, by the event loop's clock.
        since_s: the time at which the work began, by the clock that the keeper was given.
        reason: why the work ends when the limit is reached.
    """

    limit: asyncio.Timeout
    ends_s: float
    since_s: float
    reason: str

    def end(self, reason: str) -> None:
        if not self.limit.expired():
            self.reason = reason
            self.limit.reschedule(0)

    def move_end(self, ends_s: float) -> None:
        self.ends_s = ends_s
        if not self.limit.expired():
            self.limit.reschedule(ends_s)


class LeaseKeeper:
    """The leases on which a worker works, by key. Belongs to the running event loop.

    Args:
        ttl_s: the life of a lease in seconds, counted from its renewal.
        stall_timeout_s: the keeper ends work that has stood still for this time.
        clock: returns seconds; measures how long the work stands still. The clock leaves out the time for which the
            process itself was stopped.
    """

    def __init__(self, ttl_s: float, stall_timeout_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._held: dict[LeaseKey, _HeldLease] = {}
        self._num_moves = 0
        self._moved_s = clock()
        self._asked_s = self._loop.time()

    @asynccontextmanager
    async def keep(self, lease: Lease) -> AsyncIterator[None]:
        """Renew the lease as long as the block lasts.

        Raises:
            LeaseOverError: the lease ended before the block did; the block was cancelled.
        """
        limit = asyncio.timeout(lease.ttl_s)
        reason = "its lease was not renewed in time"
        held = _HeldLease(limit, self._loop.time() + lease.ttl_s, self._clock(), reason)
        try:
            async with limit:
                self._held[lease.key] = held
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise LeaseOverError(held.reason) from error
        finally:
            self._held.pop(lease.key, None)

    def renewals(self, num_moves: int) -> tuple[LeaseKey, ...]:
        """Return the leases that the next heartbeat has to renew. End the work on the leases that stand still.

        Args:
            num_moves: a count that changes when the worker's work moves. The keeper compares the count with the count
                of the last call.
        """
        now_s, self._asked_s = self._clock(), self._loop.time()
        if num_moves != self._num_moves:
            self._num_moves, self._moved_s = num_moves, now_s
        due = []
        for key, held in self._held.items():
            still_s = now_s - max(self._moved_s, held.since_s)
            if still_s >= self._stall_timeout_s:
                held.end(f"no token and no score came for {still_s:.0f} s")
            elif held.ends_s - self._asked_s <= RENEWED_BELOW * self._ttl_s:
                due.append(key)
        return tuple(due)

    def heard(self, report: MemberReport, heartbeat: Heartbeat) -> None:
        """Take the answer to a heartbeat: move the ends of renewed leases, and end the work on ended leases.

        The coordinator may say one heartbeat late that a lease is over.
        """
        for key in report.renewals:
            if (held := self._held.get(key)) is not None:
                held.move_end(self._asked_s + self._ttl_s)
        for key in heartbeat.ended:
            if (held := self._held.get(key)) is not None:
                held.end("the coordinator has ended the lease")
