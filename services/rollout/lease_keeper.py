"""Keeps the leases of a worker alive while its work moves, and ends the work on those that are over.

::

    pool ──keep──► a lease and its time limit ──renewals──► heartbeat ──► coordinator
                              ▲                                               │
                              └── heard: renewed, the limit moves on ─────────┤
                                         over, the limit is now ──────────────┘

Work on a lease ends early for one of three reasons: the coordinator says that the lease is over, no renewal was
answered for the lease's whole life, or the worker's work has stood still. Long work is no reason.

Standing still is judged for the worker as a whole: while its engine makes tokens or its samples get scores, a group
that has none yet waits for its turn. A group that the engine has forgotten holds no work up for ever: it keeps its
slot, the mesh runs out of slots behind it, and then the worker does stand still.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rollmesh.errors import RollMeshError
from rollmesh.types import Heartbeat, Lease, LeaseKey, MemberReport

RENEWED_BELOW = 2 / 3
"""A lease is renewed once less than this part of its life is left, so that some renewals may be lost."""


class LeaseOverError(RollMeshError):
    """The lease ended before its group was complete."""


@dataclass(eq=False)
class _Held:
    """``ends_s`` and ``since_s`` are times of the keeper's two clocks, that of the loop and the one it was given."""

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
        ttl_s: life of a lease from its renewal.
        stall_timeout_s: work that has stood still for so long is given up.
        clock: seconds, for standing still; without those that the process slept through.
    """

    def __init__(self, ttl_s: float, stall_timeout_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._held: dict[LeaseKey, _Held] = {}
        self._num_moves = 0
        self._moved_s = clock()
        self._asked_s = self._loop.time()

    @asynccontextmanager
    async def keep(self, lease: Lease) -> AsyncIterator[None]:
        """Renews the lease as long as the block lasts.

        Raises:
            LeaseOverError: the lease ended first; the block was cancelled.
        """
        limit = asyncio.timeout(lease.ttl_s)
        reason = "its lease was not renewed in time"
        held = _Held(limit, self._loop.time() + lease.ttl_s, self._clock(), reason)
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
        """The leases that the next heartbeat is to renew; ends the work on all that stand still.

        Args:
            num_moves: differs from the last call's where the worker's work has moved since.
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
        """The coordinator has answered a heartbeat. Its word that a lease is over may come one heartbeat late."""
        for key in report.renewals:
            if (held := self._held.get(key)) is not None:
                held.move_end(self._asked_s + self._ttl_s)
        for key in heartbeat.ended:
            if (held := self._held.get(key)) is not None:
                held.end("the coordinator has ended the lease")
