"""The moments of a run at which chaos may strike, seen from outside the processes.

::

    coordinator ─► addresses of members ─► learner: phase and step, rollout workers: samples in work
    Redis ─► number of groups in each state

The watcher asks every few milliseconds and changes nothing in the run. A moment may be over when the answer arrives:
the publish of a small model takes some 50 ms. Therefore the caller strikes at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from rollmesh.errors import DeadlineError, RollMeshError
from rollmesh.replay.connection import connect
from rollmesh.replay.ledger import Ledger
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.learner_client import LearnerClient
from rollmesh.rpc.rollout_client import RolloutClient
from rollmesh.types import GroupState, LearnerPhase, LearnerStatus, Role, RolloutStatus
from services.config import load_mesh
from services.launcher.run_folder import RESOLVED

MOMENTS = {
    "leased": "a group is leased",
    "generating": "an engine generates samples",
    "scoring": "samples wait for a score or for reference log-probabilities",
    "batched": "the groups of a batch are taken and not yet trained",
    "training": "the learner trains a batch",
    "transfer": "a version is on its way to the engines",
    "checkpoint": "the learner writes a checkpoint or an export",
}
"""Each moment, and what is true at it."""

_PHASES = {
    "training": LearnerPhase.TRAINING,
    "transfer": LearnerPhase.PUBLISHING,
    "checkpoint": LearnerPhase.CHECKPOINTING,
}
_STATES = {"leased": GroupState.LEASED, "batched": GroupState.BATCHED}
_POLL_S = 0.003
_CALL_TIMEOUT_S = 1.0
_MEMBERS_EVERY_S = 1.0
"""Time between two questions for the members: workers and learners come, and come back at another address."""


class MomentWatch:
    """A watcher of one run. Belongs to the running event loop; `close` it when done.

    Args:
        folder: the run folder.

    Raises:
        ConfigError: the run has not started its coordinator and its Redis yet.
    """

    def __init__(self, folder: Path) -> None:
        config = load_mesh(folder / RESOLVED)
        self._folder = folder
        self._coordinator = CoordinatorClient(config.coordinator.address, "chaos", "chaos")
        self._redis = connect(config.replay.require_url(), config.replay.timeout_s)
        self._ledger = Ledger(self._redis, config.run.name)
        self._learners: dict[str, LearnerClient] = {}
        self._workers: dict[str, RolloutClient] = {}
        self._members_due = 0.0

    async def wait(self, moment: str, after_step: int, timeout_s: float) -> int:
        """Return the number of trained steps as soon as the moment has come.

        Args:
            moment: a key of `MOMENTS`; empty for any moment.
            after_step: the number of steps that have to be trained before.
            timeout_s: the longest time to wait.

        Raises:
            DeadlineError: the moment did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                num_steps = await self._look(moment, after_step)
            except RollMeshError:
                num_steps, self._members_due = None, 0.0
            if num_steps is not None:
                return num_steps
            await asyncio.sleep(_POLL_S)
        what = f"the moment {moment!r}" if moment else "the moment"
        raise DeadlineError(f"{what} after step {after_step} did not come in {timeout_s:g} s")

    async def close(self) -> None:
        """Close all connections."""
        await self._close(*self._learners.values(), *self._workers.values())
        await self._coordinator.close()
        await self._redis.aclose()

    async def _look(self, moment: str, after_step: int) -> int | None:
        """Return the number of trained steps if the moment is now; else None."""
        if time.monotonic() >= self._members_due:
            await self._find_members()
        for client in self._learners.values():
            learner = await client.status(timeout_s=_CALL_TIMEOUT_S)
            if learner.num_steps >= after_step and await self._is_now(moment, learner):
                return learner.num_steps
        return None

    async def _is_now(self, moment: str, learner: LearnerStatus) -> bool:
        if not moment:
            return True
        if moment == "checkpoint" and any(self._folder.glob("checkpoints/*.partial")):
            return True  # a checkpoint may be written beside training
        if moment in _PHASES:
            return learner.phase is _PHASES[moment]
        if moment in _STATES:
            return (await self._ledger.snapshot()).num_groups[_STATES[moment]] > 0
        workers: Sequence[RolloutStatus] = await asyncio.gather(
            *(worker.status(timeout_s=_CALL_TIMEOUT_S) for worker in self._workers.values())
        )
        if moment == "generating":
            return any(worker.num_samples_generating for worker in workers)
        return any(worker.num_samples_scoring for worker in workers)

    async def _find_members(self) -> None:
        """Ask the coordinator for the addresses of the members. Without an answer the known members stay."""
        try:
            members = (await self._coordinator.status(timeout_s=_CALL_TIMEOUT_S)).members
        except RollMeshError:
            return
        learners = {member.address for member in members if member.role is Role.LEARNER}
        workers = {member.address for member in members if member.role is Role.ROLLOUT}
        await self._close(*(self._learners.pop(gone) for gone in self._learners.keys() - learners))
        await self._close(*(self._workers.pop(gone) for gone in self._workers.keys() - workers))
        self._learners |= {address: LearnerClient(address) for address in learners - self._learners.keys()}
        self._workers |= {address: RolloutClient(address) for address in workers - self._workers.keys()}
        self._members_due = time.monotonic() + _MEMBERS_EVERY_S

    @staticmethod
    async def _close(*clients: LearnerClient | RolloutClient) -> None:
        await asyncio.gather(*(client.close() for client in clients))
