"""New weights out to the engines: the learner's half of the weight protocol.

::

    begin (coordinator prepares members, names the epoch) ─► broadcast bucket by bucket ─► finish (verify, commit)
          waits for PREPARE, and for a pinned evaluation        needs the weights to stand still      in the background

The step loop stands still for the first two. The third runs on the control thread while the next batch is trained,
and is joined before the next begin, or at once where nothing could be trained without its commit.

An aborted publish leaves the old version serving. Up to ``max_staleness`` versions may go unpublished, because a later
one takes their place; with more than that the slots of their groups are never given back and the mesh would stand
still, so such a version is sent again at once, a bounded number of times.

Where ZeRO-3 has cut the weights over the ranks, gathering a bucket is a collective: rank 0 tells the others before each
transfer, and always gathers to the end, even if the broadcast failed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from rollmesh.config.shared import WeightsSection
from rollmesh.errors import DeadlineError, SupersededError, UnavailableError, WeightTransferError
from rollmesh.types import Announcement, PolicyVersion, PublishOutcome, WeightEpoch, WeightPlan
from rollmesh.weights.buckets import pack_bucket
from rollmesh.weights.group import RendezvousStore, WeightGroup
from rollmesh.weights.plan import (
    bucket_num_bytes,
    bucket_tensors,
    build_plan,
    num_buckets,
    num_bytes,
    transfer_deadline_s,
)
from rollmesh.weights.sender import send
from services.learner.control import Control
from services.learner.engine import PolicyEngine
from services.learner.ranks import Ranks

_logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
"""Tries to publish a version that has to be committed."""
RETRY_S = 1.0
"""Pause after the first aborted try; doubles with each further one."""

FINISH_MARGIN_S = 10.0
"""For the coordinator's own calls around transfer and commit."""

_SEND, _DONE = b"send", b"done"


class Publisher:
    """Publishes versions of the policy. All ranks have one and call it together.

    Args:
        section: the settings of the weight broadcast.
        engine: the policy in training.
        ranks: the process group.
        protocol: the way to the coordinator; None on the other ranks.
        max_staleness: versions that a sample may be old.
        engines_wait_s: seconds that an announcement may wait for the engines: the first one until they have started,
            a later one until a pinned evaluation has ended.
    """

    def __init__(
        self,
        section: WeightsSection,
        engine: PolicyEngine,
        ranks: Ranks,
        protocol: Control | None,
        *,
        max_staleness: int,
        engines_wait_s: float,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._protocol = protocol
        self._max_staleness = max_staleness
        self._prepare_timeout_s = section.prepare_timeout_s
        self._begin_timeout_s = section.prepare_timeout_s + engines_wait_s
        self.plan: WeightPlan = build_plan(engine.checkpoint_specs, section.bucket_bytes)
        self._deadline_s = transfer_deadline_s(
            num_bytes(self.plan), section.transfer_timeout_s, section.floor_bandwidth_bytes_per_s
        )
        # Members join, receive and load, each within its own deadline.
        self._finish_timeout_s = (
            section.prepare_timeout_s + self._deadline_s + section.commit_timeout_s + FINISH_MARGIN_S
        )
        self._store = RendezvousStore.host(section.host, section.store_port) if protocol is not None else None
        self._epoch: WeightEpoch | None = None
        self._group: WeightGroup | None = None
        self._pending: tuple[PolicyVersion, Future[PublishOutcome]] | None = None
        self._reason = ""
        largest = max(bucket_num_bytes(self.plan, index) for index in range(num_buckets(self.plan)))
        self._buffer = torch.empty(largest if ranks.is_first else 0, dtype=torch.uint8, device=ranks.device)
        self.committed: PolicyVersion | None = None
        self.max_pause_s = 0.0

    def publish(self, version: PolicyVersion, step: int, *, must_commit: bool = False) -> None:
        """Announce and send a version. Its commit is joined later unless nothing can go on without it.

        Args:
            version: newer than the last.
            step: the step that made the version.
            must_commit: return only once it serves.

        Raises:
            WeightTransferError: a version that has to be committed was aborted `MAX_ATTEMPTS` times (rank 0).
            RollMeshError: the coordinator is lost or the run is over (rank 0).
        """
        with self._led() as is_leader:
            if is_leader:
                self.settle()
                self._publish(version, step, must_commit or self._is_needed(version))

    def ensure_committed(self, version: PolicyVersion, step: int) -> None:
        """Join the commit of the last published version, which ``step`` made; publish it again if it was aborted.

        Raises:
            As `publish`.
        """
        with self._led() as is_leader:
            if is_leader:
                self.settle()
                if self.committed != version:
                    self._publish(version, step, must_commit=True)

    def settle(self) -> None:
        """Join the commit that is under way, if any. Rank 0 waits; the others return at once."""
        if self._pending is None:
            return
        (version, future), self._pending = self._pending, None
        outcome = future.result()
        if outcome.is_committed:
            self.committed, self.max_pause_s = version, outcome.max_pause_s
        else:
            _logger.warning("version %s was not committed: %s", version, outcome.abort_reason)
            self._reason = outcome.abort_reason
            self._leave_group()  # as every member does: a broken collective may have ended well here

    def close(self) -> None:
        """Leave the broadcast group and stop hosting the store."""
        self._leave_group()
        self._store = None

    def _is_needed(self, version: PolicyVersion) -> bool:
        """Whether more than ``max_staleness`` versions would be uncommitted while this one is."""
        return self.committed is None or version.number - self.committed.number > self._max_staleness

    def _publish(self, version: PolicyVersion, step: int, must_commit: bool) -> None:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            self._send(version, step)
            if not must_commit:
                return
            self.settle()
            if self.committed == version:
                return
            if attempt < MAX_ATTEMPTS:
                time.sleep(RETRY_S * 2 ** (attempt - 1))
        raise WeightTransferError(
            f"version {version} was not committed in {MAX_ATTEMPTS} tries, for the last time because: {self._reason}"
        )

    def _send(self, version: PolicyVersion, step: int) -> None:
        """Begin, broadcast, start to finish; what fails before the commit ends in the log and in `_reason`."""
        assert self._protocol is not None
        assert self._store is not None
        try:
            announcement = Announcement(
                version, step, self.plan, self._store.address, self._store.port, self._deadline_s
            )
            epoch = self._protocol.begin_publish(announcement, self._begin_timeout_s)
        except (UnavailableError, DeadlineError, SupersededError, WeightTransferError) as error:
            _logger.warning("version %s could not be announced: %s", version, error)
            self._reason = str(error)
            return
        digest, failure = b"", ""
        try:
            group = self._join(epoch)
            if self._engine.needs_all_ranks:
                self._ranks.broadcast_bytes(_SEND)
            buckets = self._buckets()
            try:
                digest = send(group, self.plan, buckets, self._deadline_s)
            finally:
                for _ in buckets:  # the other ranks gather every bucket
                    pass
        except (WeightTransferError, DeadlineError) as error:
            failure = str(error) or type(error).__name__
            self._leave_group()
        self._pending = version, self._protocol.finish_publish(version, digest, failure, self._finish_timeout_s)

    def _join(self, epoch: WeightEpoch) -> WeightGroup:
        if self._group is None or self._epoch != epoch:
            self._leave_group()
            self._group = WeightGroup.join(epoch, 0, self._prepare_timeout_s, self._ranks.device)
            self._epoch = epoch
        return self._group

    def _leave_group(self) -> None:
        group, self._group, self._epoch = self._group, None, None
        if group is not None:
            group.close()

    @contextlib.contextmanager
    def _led(self) -> Iterator[bool]:
        """True on rank 0; the other ranks gather along with it until it is done."""
        is_leader = self._protocol is not None
        try:
            yield is_leader
        finally:
            if self._engine.needs_all_ranks and is_leader:
                self._ranks.broadcast_bytes(_DONE)
        while self._engine.needs_all_ranks and not is_leader and self._ranks.broadcast_bytes(None) == _SEND:
            for _ in self._buckets():
                pass

    def _buckets(self) -> Iterator[Tensor]:
        """The plan's buckets as flat uint8 tensors in one buffer; each is valid until the next is asked for.

        On the other ranks they are empty: only the gathering counts there.
        """
        for index in range(num_buckets(self.plan)):
            bucket = self._buffer[:0]
            with self._engine.checkpoint_tensors(spec.name for spec in bucket_tensors(self.plan, index)) as tensors:
                if self._ranks.is_first:
                    bucket = pack_bucket(self.plan, index, tensors, self._buffer)
            yield bucket
