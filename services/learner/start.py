"""The start of a learner: after the newest checkpoint that fits the ledger, or with the initial model.

::

    checkpoints in the run folder ─┐
                                   ├─► step ─► the queue is taken over ─► models, optimisers, numbers ─► version
    steps that the ledger knows ───┘            later steps are trained again

A new run begins in the same way: no checkpoint exists, and the ledger is empty.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgpack

from rollmesh.errors import ConfigError
from rollmesh.types import PolicyVersion
from services.learner.checkpoint import CheckpointStore, Learnables
from services.learner.intake import Intake
from services.learner.ranks import Ranks

_logger = logging.getLogger(__name__)

FIRST_VERSION = PolicyVersion(lineage=0, number=0)


@dataclass(frozen=True, slots=True)
class Start:
    """The state before the first step of this process.

    Attributes:
        step: the last step that was trained; 0 for the initial model.
        version: the version of the policy, which this process has not published yet.
        state: the numbers of trainer and loop from the checkpoint of ``step``; empty without a checkpoint.
    """

    step: int = 0
    version: PolicyVersion = FIRST_VERSION
    state: Mapping[str, float] = field(default_factory=dict)


def begin(
    intake: Intake, checkpoints: CheckpointStore, learnables: Learnables, ranks: Ranks, newest: PolicyVersion | None
) -> Start:
    """Take the queue over, restore the newest checkpoint that fits the ledger, and return the start. Collective.

    Args:
        intake: the reader of the run's queue.
        checkpoints: the checkpoints of the run.
        learnables: the engines, with the initial weights.
        ranks: the process group.
        newest: the newest version that an engine may have served; None for no version. Used on rank 0 only.

    Raises:
        ConfigError: no checkpoint fits the ledger, or the checkpoint does not fit the configuration.
        SupersededError: another learner took the queue over meanwhile (rank 0).
    """
    message = None
    if ranks.is_first:
        step = choose_step(checkpoints.steps(), intake.possible_starts())
        intake.take_over(step)
        checkpoints.drop_later(step)
        message = msgpack.packb([step, None if newest is None else str(newest)])
    step, known = msgpack.unpackb(ranks.broadcast_bytes(message))
    newest = None if known is None else PolicyVersion.parse(known)
    if step == 0:
        return Start(version=next_version(FIRST_VERSION, newest))
    manifest = checkpoints.load(learnables, step)
    start = Start(step, next_version(manifest.version, newest), manifest.state)
    if ranks.is_first:
        _logger.info("going on after step %d, with version %s", step, start.version)
    return start


def choose_step(saved: Sequence[int], possible: range) -> int:
    """Return the newest step after which the run can go on.

    The initial model counts as a checkpoint of step 0. Checkpoints of steps 2, 4 and 8 with the possible steps 3 to 7
    give step 4, and a warning about step 8.

    Args:
        saved: the steps of the complete checkpoints, ascending.
        possible: the steps after which a learner can take the queue over, from `BatchQueue.possible_starts`.

    Raises:
        ConfigError: no checkpoint fits, or all checkpoints are newer than the ledger.
    """
    fitting = [step for step in (0, *saved) if step in possible]
    newer = [step for step in saved if step >= possible.stop]
    place, fix = "learner.checkpoint", "restore it, or start anew with --overwrite"
    if not fitting:
        problem = f"no checkpoint of step {possible.start} or later is left, and the groups of earlier steps are gone"
        raise ConfigError(place, problem, fix)
    if newer and len(newer) == len(saved):
        problem = f"the checkpoint of step {newer[-1]} is newer than the ledger, which knows {possible.stop - 1} steps"
        raise ConfigError(place, problem, "restore the Redis that the run had, or start anew with --overwrite")
    if newer:
        _logger.warning("the checkpoint of step %d is newer than the ledger and is not used", newer[-1])
    return max(fitting)


def next_version(saved: PolicyVersion, newest: PolicyVersion | None) -> PolicyVersion:
    """Return the version with which a policy that was saved as ``saved`` goes on.

    Two different policies never have the same version. So a policy that is older than the newest version gets the next
    lineage: ``0.6`` goes on as ``1.9`` where ``0.8`` may have been served.

    Args:
        saved: the version in the checkpoint.
        newest: the newest version that an engine may have served; None for no version.
    """
    if newest is None or saved >= newest:
        return saved
    return PolicyVersion(newest.lineage + 1, newest.number + 1)
