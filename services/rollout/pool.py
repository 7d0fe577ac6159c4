"""Works on the open groups of a worker, and grants the coordinator credits for further groups.

::

    coordinator ──lease──► take ──► group task ──► delivery ──► one more credit ──► coordinator
                            │   (render, generate, score)
                 at most `max_open_groups` credits and open groups together

There is no batch and no barrier: when a group ends, the next lease may come, however long other groups take. A group's
task waits for the scorers and for Redis with a deadline each. The task waits for the engine as long as its lease lives;
`lease_keeper` renews the lease while the worker's work moves.
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
    """Works on leases until the pool is closed.

    Args:
        runner: makes the samples of a group.
        delivery: ends leases.
        keeper: renews leases.
        counts: the pool counts the committed groups here.
        max_open_groups: the most leases that are held or asked for at the same time.
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
        """Take leases and work on them. Return when no more leases come and the open groups have ended.

        No more leases come when the pool is closed or the run is over.

        Raises:
            RollMeshError: the coordinator, Redis, the engine or the configuration makes further work impossible.
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
            source: the stream that `run` takes leases from.
            grace_s: seconds; may be 0.
            reason: why the worker closes; the ledger records the reason.
        """
        self._is_closing = True
        await source.close()
        if grace_s > 0 and not running.done():
            await asyncio.wait({running}, timeout=grace_s)
        running.cancel()
        # Also cancel each group: `run` may be past the point at which its cancellation reaches the groups.
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
        """Work on a group, and end its lease whatever happens to the group."""
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
"""Time that cancelled groups may take to leave the engine."""
_HAND_BACK_TIMEOUT_S = 3.0
"""Time for which handing leases back may delay a worker that leaves."""
