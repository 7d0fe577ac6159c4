"""The groups that a worker has open, and the credits it grants for more.

::

    coordinator ──lease──► take ──► group task ──► delivery ──► one more credit ──► coordinator
                            │   (render, generate, score)
                 at most `max_open_groups` credits and open groups together

There is no batch and no barrier: whenever a group ends, however long others take, the next lease may come. A group task
waits for the scorers and Redis with a deadline each, and for the engine as long as its lease lives, which
`lease_keeper` renews while the worker's work moves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from rollmesh.data.render import OverlongPromptError
from rollmesh.errors import InvalidArgumentError, UnavailableError
from rollmesh.rpc.lease_stream import LeaseStream
from rollmesh.types import Lease, LeaseKind, Sample
from services.rollout.delivery import Delivery
from services.rollout.group import GenerationCounts, GenerationCutShortError, GroupRunner, TooFewSamplesError
from services.rollout.lease_keeper import LeaseKeeper, LeaseOverError
from services.rollout.scoring import ScoringFailedError

_logger = logging.getLogger(__name__)


class GroupPool:
    """Works on leases until it is closed.

    Args:
        runner: makes a group's samples.
        delivery: ends leases.
        keeper: renews leases.
        counts: counted into.
        max_open_groups: leases held, or asked for, at the same time.
    """

    def __init__(
        self,
        runner: GroupRunner,
        delivery: Delivery,
        keeper: LeaseKeeper,
        counts: GenerationCounts,
        max_open_groups: int,
    ) -> None:
        self._runner = runner
        self._delivery = delivery
        self._keeper = keeper
        self._counts = counts
        self._max_open_groups = max_open_groups
        self._open: dict[str, tuple[Lease, asyncio.Task[None]]] = {}
        self._unsettled: dict[tuple[str, int], Lease] = {}
        self._is_closing = False

    @property
    def num_groups_open(self) -> int:
        return len(self._open)

    async def run(self, source: LeaseStream) -> None:
        """Take leases and work on them. Returns when no more leases come, because the pool is closed or the run is
        over, and the open groups have ended.

        Raises:
            RollMeshError: the coordinator, Redis, the engine or the configuration makes it impossible to go on.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                source.grant(self._max_open_groups)
                async for lease in source:
                    self._take(lease, source, tasks)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def close(self, running: asyncio.Task[None], source: LeaseStream, grace_s: float, reason: str) -> None:
        """Take no more leases, give the open groups ``grace_s`` to end, and hand the rest back.

        Args:
            running: the task of `run`.
            source: what it takes leases from.
            grace_s: may be 0.
            reason: why, for the ledger.
        """
        self._is_closing = True
        await source.close()
        if grace_s > 0 and not running.done():
            await asyncio.wait({running}, timeout=grace_s)
        running.cancel()
        # Also one by one: `run` may have been past the point where its cancellation reaches them.
        for _, task in self._open.values():
            task.cancel()
        await asyncio.wait({running}, timeout=_CANCEL_TIMEOUT_S)
        leases = list(self._unsettled.values())
        if leases:
            _logger.info("%d open groups are handed back: %s", len(leases), reason)
            await self._delivery.hand_back(leases, reason, _HAND_BACK_TIMEOUT_S)

    def _take(self, lease: Lease, source: LeaseStream, tasks: asyncio.TaskGroup) -> None:
        held, task = self._open.get(lease.group_id, (None, None))
        if held is not None and task is not None:
            if held.fencing_token >= lease.fencing_token:
                _logger.info("lease arrived twice", extra={"group": lease.group_id})
                source.grant(1)
                return
            _logger.info("lease replaces an older one", extra={"group": lease.group_id})
            task.cancel()
            self._unsettled.pop((held.group_id, held.fencing_token), None)
            source.grant(1)
        self._unsettled[lease.group_id, lease.fencing_token] = lease
        self._open[lease.group_id] = lease, tasks.create_task(self._work(lease, source), name=f"group {lease.group_id}")

    async def _work(self, lease: Lease, source: LeaseStream) -> None:
        try:
            await self._settle(lease)
            self._unsettled.pop((lease.group_id, lease.fencing_token), None)
        finally:
            if self._open.get(lease.group_id, (None,))[0] is lease:
                del self._open[lease.group_id]
        if not self._is_closing:
            source.grant(1)

    async def _settle(self, lease: Lease) -> None:
        """Work on a group and end its lease, one way or another."""
        try:
            async with self._keeper.keep(lease):
                samples = await self._runner.run(lease)
        except OverlongPromptError as error:
            await self._delivery.leave_out(lease, str(error))
        except (InvalidArgumentError, TooFewSamplesError) as error:
            await self._delivery.give_back(lease, str(error), is_final=True)
        except (ScoringFailedError, GenerationCutShortError, LeaseOverError, UnavailableError) as error:
            await self._delivery.give_back(lease, str(error))
        else:
            await self._deliver(lease, samples)

    async def _deliver(self, lease: Lease, samples: Sequence[Sample]) -> None:
        is_taken = await self._delivery.deliver(lease, samples)
        if is_taken and lease.kind is LeaseKind.TRAIN:
            self._counts.num_groups_committed += 1


_CANCEL_TIMEOUT_S = 5.0
"""How long cancelled groups may take to leave the engine."""
_HAND_BACK_TIMEOUT_S = 3.0
"""How long handing back may hold up a worker that leaves."""
