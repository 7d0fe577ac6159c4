"""The intake: each rank's share of a batch, from the replay queue.

::

    Redis ──take_batch──► rank 0 ──rows (ids, tokens)─────► all ranks: the same balanced split
      └───────────────────────── payloads ────────────────► each rank reads its own share

Rank 0 alone changes the ledger. The other ranks wait in a broadcast until rank 0 has a batch or the run has ended.
"""

from __future__ import annotations

import enum
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgpack

from rollmesh.aio.awake import AwakeClock
from rollmesh.errors import DeadlineError, ReplayError, UnavailableError
from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.staleness import StalenessWindow
from rollmesh.types import Group, PolicyVersion
from services.learner.batching import split_batch
from services.learner.ranks import Ranks

_logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

RETRY_S = 0.5
"""Pause between two tries while Redis is away."""
LOOK_LIMIT_S = 60.0
"""A longer time between two looks at the queue means that this process was stopped, and does not count as an outage."""
POLL_S = 2.0
"""Longest time in one call for a batch. Between two calls, rank 0 checks that the run still goes on."""


class NoBatch(enum.Enum):
    """The reasons for which `Intake.take` returns no batch."""

    END = "no group is left"
    PUBLISH = "a rollout worker waits for the present version, and no batch is complete"


@dataclass(frozen=True, slots=True)
class RankShare:
    """One rank's part of a batch, as read from Redis.

    Attributes:
        groups_by_step: this rank's groups of each optimiser step.
        batch_ids: the ids of all groups of the batch, in its order.
        num_filtered: groups that were FILTERED so far in the run.
        is_last: whether no batch follows.
        wait_s: seconds until the batch was complete.
        read_s: seconds in which this rank read its payloads.
    """

    groups_by_step: tuple[tuple[Group, ...], ...]
    batch_ids: tuple[str, ...]
    num_filtered: int
    is_last: bool
    wait_s: float
    read_s: float

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return this rank's groups of all optimiser steps."""
        return tuple(group for groups in self.groups_by_step for group in groups)


def check_staleness(groups: Iterable[Group], learner: PolicyVersion, bound: int) -> None:
    """Refuse groups with a sample that is older than the staleness bound, or newer than the learner.

    The number of a version only grows, also from one lineage to the next. So the difference of two numbers is the
    staleness, whatever the lineages: ``1.9`` is two versions after ``0.7``.

    Args:
        groups: the groups that the step is about to train on.
        learner: the version that the step starts from.
        bound: the largest permitted staleness in versions, `rollmesh.replay.staleness.StalenessWindow.bound`.

    Raises:
        ReplayError: a sample is too old or too new. The error names the group, the version and the bound.
    """
    for group in groups:
        for span in (span for sample in group.samples for span in sample.version_spans):
            age = learner.number - span.version.number
            youngest = 0 if span.version.lineage == learner.lineage else 1  # a new lineage begins with a new number
            if span.version > learner or not youngest <= age <= bound:
                raise ReplayError(
                    f"group {group.group_id} has tokens of version {span.version}, but the learner is at "
                    f"{learner} and the staleness bound is {bound}: admission is broken"
                )


class Intake:
    """The reader of batches on all ranks.

    Args:
        queue: this rank's own connection to the replay queue.
        ranks: the process group.
        batch_size: groups in a batch.
        steps_per_batch: optimiser steps in one pass over a batch.
        bounds: the window of places that a batch may take groups from, and the staleness bound.
        timeout_s: seconds that the queue may be away. A batch may take longer: after this time all ranks begin a new
            wait, so that no collective times out.
        check: called again and again while rank 0 waits; raises an error when the run is over.
        is_publish_wanted: returns whether a rollout worker waits for the present version. Called on rank 0 only.
    """

    def __init__(
        self,
        queue: BatchQueue,
        ranks: Ranks,
        batch_size: int,
        steps_per_batch: int,
        bounds: StalenessWindow,
        timeout_s: float,
        check: Callable[[], None],
        is_publish_wanted: Callable[[], bool],
    ) -> None:
        self._queue = queue
        self._ranks = ranks
        self._batch_size = batch_size
        self._steps_per_batch = steps_per_batch
        self._bounds = bounds
        self._timeout_s = timeout_s
        self._check = check
        self._is_publish_wanted = is_publish_wanted
        self._num_filtered = 0
        self._clock = AwakeClock(LOOK_LIMIT_S)

    def possible_starts(self) -> range:
        """Return the steps after which a learner can take the queue over (`BatchQueue.possible_starts`). For rank 0."""
        return self._patiently(self._queue.possible_starts)

    def take_over(self, step: int) -> None:
        """Take the queue over after ``step``, so that the groups of later steps are trained again. For rank 0.

        Raises:
            SupersededError: another learner took the queue over meanwhile.
        """
        num_ready, num_pending = self._patiently(lambda: self._queue.take_over(step))
        if num_ready or num_pending:
            _logger.info("%d groups are trained again, %d generated again", num_ready + num_pending, num_pending)

    def take(
        self, step: int, version: PolicyVersion, meanwhile: Callable[[], None] = lambda: None
    ) -> RankShare | NoBatch:
        """Return this rank's share of the batch of ``step``, or why there is no batch. Collective.

        Args:
            step: number of the step, from 1.
            version: the version that the step starts from.
            meanwhile: called again and again while rank 0 waits.

        Raises:
            DeadlineError: the queue was away for too long (rank 0).
            ReplayError: a payload is missing.
            RollMeshError: the run is over (rank 0).
        """
        started = time.monotonic()
        message = b""
        while not message:
            message = self._ranks.broadcast_bytes(
                self._wait(step, version, meanwhile) if self._ranks.is_first else None
            )
        waited = time.monotonic()
        batch = msgpack.unpackb(message)
        if isinstance(batch, str):
            return NoBatch[batch]
        split = split_batch(batch["num_tokens"], self._steps_per_batch, self._ranks.world_size)
        mine = [shares[self._ranks.rank] for shares in split]
        batch_ids = tuple(batch["group_ids"])
        groups = iter(self.read([batch_ids[index] for indices in mine for index in indices]))
        groups_by_step = tuple(tuple(itertools.islice(groups, len(indices))) for indices in mine)
        read_s = time.monotonic() - waited
        return RankShare(groups_by_step, batch_ids, batch["num_filtered"], batch["is_last"], waited - started, read_s)

    def read(self, group_ids: Sequence[str]) -> tuple[Group, ...]:
        """Return the groups with these ids, in their order.

        Raises:
            ReplayError: a group has no payload.
        """
        return tuple(self._patiently(lambda: self._queue.payloads(group_ids)))

    def _wait(self, step: int, version: PolicyVersion, meanwhile: Callable[[], None]) -> bytes:
        """Wait for the batch and return its rows as msgpack: the message of rank 0 to the other ranks.

        Where there is no batch, the message is the name of a `NoBatch`. The message is empty after ``timeout_s``; then
        all ranks begin a new wait.
        """
        deadline = self._clock() + self._timeout_s
        while True:
            self._check()
            meanwhile()
            remaining_s = deadline - self._clock()
            try:
                batch = self._queue.take_batch(
                    step,
                    self._batch_size,
                    self._bounds.size,
                    min(POLL_S, max(0.05, remaining_s)),
                    version.lineage,
                    version.number - self._bounds.bound,
                )
                break
            except DeadlineError:
                if self._is_publish_wanted():
                    return bytes(msgpack.packb(NoBatch.PUBLISH.name))
                if remaining_s <= POLL_S:
                    return b""
            except UnavailableError as error:
                if remaining_s <= POLL_S:
                    raise DeadlineError(f"learner.batch_timeout_s = {self._timeout_s:g} passed: {error}") from error
        if batch is None:
            return bytes(msgpack.packb(NoBatch.END.name))
        self._patiently(self._refresh_filtered)
        return bytes(
            msgpack.packb(
                {
                    "group_ids": [row.group_id for row in batch.rows],
                    "num_tokens": [row.num_tokens for row in batch.rows],
                    "num_filtered": self._num_filtered,
                    "is_last": batch.is_last,
                }
            )
        )

    def _refresh_filtered(self) -> None:
        self._num_filtered = self._queue.num_filtered()

    def mark_trained(self, step: int) -> None:
        """Record that the policy has been trained on the groups of ``step``. Does nothing on ranks other than 0."""
        if self._ranks.is_first:
            self._patiently(lambda: self._queue.mark_trained(step))

    def make_durable(self) -> None:
        """Bring the ledger to disk, so that after a power cut no checkpoint is newer than the ledger.

        Does nothing on ranks other than 0.
        """
        if self._ranks.is_first and not self._patiently(self._queue.make_durable):
            _logger.debug("Redis does not say that its file is on disk")

    def retire(self, through_step: int) -> None:
        """Drop the payloads of the steps up to ``through_step``, which no learner needs again.

        Does nothing on ranks other than 0.
        """
        if self._ranks.is_first:
            self._patiently(lambda: self._queue.retire(through_step))

    def _patiently(self, call: Callable[[], ResultT]) -> ResultT:
        """Make a call, and repeat the call while Redis is away, for at most ``timeout_s``. Return its result."""
        deadline = self._clock() + self._timeout_s
        while True:
            try:
                return call()
            except UnavailableError as error:
                if self._clock() >= deadline:
                    raise
                _logger.warning("the replay queue is away, trying again: %s", error)
                self._check()
                time.sleep(RETRY_S)
