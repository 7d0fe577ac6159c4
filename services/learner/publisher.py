"""The learner's half of a publish: new weights go out to the engines.

::

    begin (coordinator prepares members, names the epoch) ─► broadcast bucket by bucket ─► finish (verify, commit)
          waits for PREPARE, and for a pinned evaluation        the weights may not change            in the background

The step loop waits for begin and broadcast. Finish runs on the control thread while the next batch is trained. The loop
waits for its end before the next begin; or at once, where no batch can be complete before the version is committed.

After an aborted publish the old version goes on serving. Up to ``max_staleness`` versions may stay uncommitted, because
a later version replaces them. With more, the slots of their groups would never be released, and the mesh would stand
still. So such a version is sent again at once, at most `MAX_ATTEMPTS` times.

Where ZeRO-3 has cut the weights over the ranks, gathering a bucket is a collective. Rank 0 tells the other ranks before
each transfer, and gathers all buckets even if the broadcast fails.
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
"""Number of tries to publish a version that has to be committed."""
RETRY_S = 1.0
"""Pause after the first aborted try. The pause doubles with each further try."""

FINISH_MARGIN_S = 10.0
"""Time added for the coordinator's calls before and after transfer and commit."""

_SEND, _DONE = b"send", b"done"
_UNHEARD = (UnavailableError, DeadlineError, SupersededError)
"""Errors of calls whose outcome may be learned later, or that may be made again."""


class Publisher:
    """The learner's side of a publish. Every rank has a publisher, and all ranks call the same method together.

    Args:
        section: the settings of the weight broadcast.
        engine: the policy in training.
        ranks: the process group.
        protocol: the connection to the coordinator; None on ranks other than 0.
        max_staleness: the largest staleness of a sample that the settings permit, in versions.
        engines_wait_s: seconds that an announcement may wait for the engines: at first until the engines have started,
            later until a pinned evaluation has ended.

    Attributes:
        plan: the order of the tensors in a transfer.
        committed: the newest committed version of this process; None before the first commit. Only kept on rank 0.
        max_pause_s: the longest pause of an engine in the last committed publish, in seconds. Only kept on rank 0.
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
        # The members join, receive and load. Each of the three has its own deadline.
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
        """Announce and send a version. Wait for its commit only if training could not go on without the commit.

        Args:
            version: a newer version than the last; or the last version again, for the workers that lack it.
            step: the step that made the version.
            must_commit: always wait until the version is committed.

        Raises:
            WeightTransferError: a version that has to be committed was aborted `MAX_ATTEMPTS` times (rank 0).
            RollMeshError: the coordinator is lost or the run is over (rank 0).
        """
        with self._led() as is_leader:
            if is_leader:
                self.settle()
                self._publish(version, step, must_commit or self._is_needed(version))

    def ensure_committed(self, version: PolicyVersion, step: int) -> None:
        """Wait for the commit of the last published version. Publish the version again if the publish was aborted.

        Args:
            version: the last published version.
            step: the step that made the version.

        Raises:
            WeightTransferError: as for `publish`.
            RollMeshError: as for `publish`.
        """
        with self._led() as is_leader:
            if is_leader:
                self.settle()
                if self.committed != version:
                    self._publish(version, step, must_commit=True)

    def settle(self) -> None:
        """Wait for the end of the publish that is under way, if any. Ranks other than 0 return at once."""
        if self._pending is None:
            return
        (version, future), self._pending = self._pending, None
        try:
            outcome = future.result()
        except _UNHEARD as error:  # a coordinator that was started again knows nothing of the publish
            outcome = PublishOutcome(False, f"its outcome was not heard ({error})", (), 0.0)
        if outcome.is_committed:
            self.committed, self.max_pause_s = version, outcome.max_pause_s
        else:
            _logger.warning("version %s was not committed: %s", version, outcome.abort_reason)
            self._reason = outcome.abort_reason
            self._leave_group()  # as every member does: a collective that failed on a member may have succeeded here

    def close(self) -> None:
        """Leave the broadcast group, and stop hosting the rendezvous store."""
        self._leave_group()
        self._store = None

    def _is_needed(self, version: PolicyVersion) -> bool:
        """Return whether more than ``max_staleness`` versions would be uncommitted without this version.

        With a ``max_staleness`` of 1 and the committed version 0.3, version 0.5 is needed: 5 - 3 = 2.
        """
        return self.committed is None or version.number - self.committed.number > self._max_staleness

    def _publish(self, version: PolicyVersion, step: int, must_commit: bool) -> None:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            self._send(version, step)
            if not must_commit:
                return
            self.settle()
            assert self._protocol is not None
            if self._protocol.committed_version == version:  # also where the outcome of an earlier try was not heard
                self.committed = version
            if self.committed == version:
                return
            if attempt < MAX_ATTEMPTS:
                time.sleep(RETRY_S * 2 ** (attempt - 1))
        raise WeightTransferError(
            f"version {version} was not committed in {MAX_ATTEMPTS} tries, for the last time because: {self._reason}"
        )

    def _send(self, version: PolicyVersion, step: int) -> None:
        """Begin, broadcast, and start to finish. A failure of begin goes to the log and to `_reason`.

        A failure of the broadcast goes to the coordinator, which then aborts the publish.
        """
        assert self._protocol is not None
        assert self._store is not None
        try:
            announcement = Announcement(
                version, step, self.plan, self._store.address, self._store.port, self._deadline_s
            )
            epoch = self._protocol.begin_publish(announcement, self._begin_timeout_s)
        except (*_UNHEARD, WeightTransferError) as error:
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
        """Yield True on rank 0, and False on the other ranks, which gather with rank 0 until rank 0 is done."""
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
        """Yield the plan's buckets as flat uint8 tensors in one buffer. Each is valid until the next is asked for.

        On ranks other than 0 the buckets are empty, because these ranks only take part in the gathering.
        """
        for index in range(num_buckets(self.plan)):
            bucket = self._buffer[:0]
            with self._engine.checkpoint_tensors(spec.name for spec in bucket_tensors(self.plan, index)) as tensors:
                if self._ranks.is_first:
                    bucket = pack_bucket(self.plan, index, tensors, self._buffer)
            yield bucket
