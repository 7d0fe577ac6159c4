"""One try to publish a version: its workers, its tasks, and sentences about its waiting and its failure."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from rollmesh.errors import DeadlineError, RollMeshError, UnavailableError, WeightTransferError
from rollmesh.types import Announcement, PolicyVersion, PublishOutcome, ReceiveReport, WeightEpoch
from services.coordinator.members import Member
from services.coordinator.rollout_clients import Party

MAX_NAMES = 4
"""The most workers that a sentence names."""


@dataclass
class Attempt:
    """One try to publish a version.

    Attributes:
        announcement: what the learner announced.
        learner: the incarnation of the learner.
        stage: a clause that says for what the attempt waits. If ``pending`` holds names, they come first:
            "rollout-1 to load version 0.3".
        pending: names of the workers that have not answered yet.
        begin: the task of ANNOUNCE and PREPARE.
        finish: the task of VERIFY and COMMIT.
        parties: the workers of the weight epoch.
        receives: the RECEIVE calls under way, by the name of the worker.
    """

    announcement: Announcement
    learner: str
    stage: str = ""
    pending: set[str] = field(default_factory=set)
    begin: asyncio.Task[WeightEpoch] | None = None
    finish: asyncio.Task[PublishOutcome] | None = None
    parties: list[Party] = field(default_factory=list)
    receives: dict[str, asyncio.Task[ReceiveReport]] = field(default_factory=dict)

    @property
    def version(self) -> PolicyVersion:
        return self.announcement.version

    @property
    def waits_for(self) -> str:
        """A clause that says for what the attempt waits; empty for an attempt that has ended."""
        if self.has_failed_to_begin:
            return ""
        return f"{names_of(self.pending)} {self.stage}" if self.pending and self.stage else self.stage

    @property
    def has_failed_to_begin(self) -> bool:
        """Whether ANNOUNCE and PREPARE ended with an error or were cancelled."""
        begin = self.begin
        return begin is not None and begin.done() and (begin.cancelled() or begin.exception() is not None)


def transfer_problem(member: Member, receive: asyncio.Task[ReceiveReport], digest: bytes) -> str:
    """Return a clause that says why a worker's RECEIVE does not count; empty if the worker received all bytes."""
    if receive.cancelled():
        return f"{member.name} was given up"
    if (error := receive.exception()) is not None:
        if not isinstance(error, RollMeshError):
            raise error
        return f"{member.name} did not receive the weights ({error})"
    digests = receive.result().digests
    if len(digests) != member.num_weight_ranks:
        return f"{member.name} reported {len(digests)} digests for {member.num_weight_ranks} processes"
    if any(received != digest for received in digests):
        return f"{member.name} received other bytes than were sent"
    return ""


def no_worker_ready(version: PolicyVersion, refusals: dict[str, RollMeshError]) -> RollMeshError:
    """Return the error of a publish for which no worker is ready: an UnavailableError if another try may help.

    Args:
        refusals: by name of each worker that was asked, why the worker is not ready.
    """
    if not refusals:
        return UnavailableError(f"no rollout worker is left for version {version}; start one")
    reasons = "; ".join(f"{name}: {error}" for name, error in refusals.items())
    message = f"no rollout worker got ready for version {version} ({reasons})"
    may_pass = all(isinstance(error, (UnavailableError, DeadlineError)) for error in refusals.values())
    return UnavailableError(message) if may_pass else WeightTransferError(message)


def names_of(names: Collection[str]) -> str:
    """Return names for a sentence: up to `MAX_NAMES` of them, and the number of further names."""
    shown = ", ".join(sorted(names)[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
