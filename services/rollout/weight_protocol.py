"""The engine's half of the weight protocol: which call is legal when, and what a repeated one answers.

::

    prepare(v) ──► receive(v) ──► commit(v)            each step runs once, as a task of this object;
        └──────────────┴──► abort(v)                   who repeats a call waits for, or gets, the same answer

A step does not end with the call that began it: a coordinator that lost the connection asks again, and gets the
answer of the step that it began before. The old version serves until a commit has succeeded. A load that fails midway
leaves parts of two versions in the engine: the worker is tainted, and `watch` tells its owner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from rollmesh.errors import InvalidArgumentError, RollMeshError, SupersededError, TaintedError
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, WeightEpoch, WeightPlan
from services.rollout.engine import Engine

_logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

_CANCEL_TIMEOUT_S = 10.0
"""How long a step may take to let go of the engine."""


@dataclass
class _VersionTransfer:
    """One version from PREPARE to COMMIT. A step that has not begun is None."""

    version: PolicyVersion
    epoch: WeightEpoch
    rank: int
    prepared: asyncio.Task[None]
    received: asyncio.Task[ReceiveReport] | None = None
    committed: asyncio.Task[CommitReport] | None = None

    @property
    def steps(self) -> list[asyncio.Task[Any]]:
        return [step for step in (self.prepared, self.received, self.committed) if step is not None]

    @property
    def is_committed(self) -> bool:
        step = self.committed
        return step is not None and step.done() and not step.cancelled() and step.exception() is None

    @property
    def is_committing(self) -> bool:
        return self.committed is not None and not self.committed.done()


class WeightProtocol:
    """The state machine in front of one engine. Belongs to the running event loop; `close` ends what it runs.

    Args:
        engine: receives and loads the weights. Every method of the engine ends by a deadline. `Engine.commit` raises
            TaintedError where the load failed midway. After any other error of the mesh the old version is whole.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._transfer: _VersionTransfer | None = None
        self._turn = asyncio.Lock()
        self._taint: asyncio.Future[TaintedError] = asyncio.get_running_loop().create_future()

    @property
    def is_tainted(self) -> bool:
        """Whether a load has failed midway. Never changes back."""
        return self._taint.done()

    async def watch(self) -> NoReturn:
        """Wait until the worker is tainted; its owner then gives it up.

        Raises:
            TaintedError: always; says which version could not be loaded and why.
        """
        raise await asyncio.shield(self._taint)

    async def prepare(
        self, version: PolicyVersion, plan: WeightPlan, epoch: WeightEpoch, rank: int, deadline_s: float
    ) -> None:
        """Prepare for a version. An older version that was not committed is dropped.

        Args:
            version: the version.
            plan: the tensors that the learner will send.
            epoch: the process group that carries them.
            rank: the rank of this worker's first process in the group.
            deadline_s: time for the transfer.

        Raises:
            SupersededError: a newer version is in preparation or serves already.
            TaintedError: an earlier load failed midway.
            WeightTransferError: the engine cannot receive the plan.
        """
        async with self._turn:
            self._refuse_if_tainted()
            transfer = self._transfer
            if transfer is not None and version < transfer.version:
                raise SupersededError(f"version {version} is older than version {transfer.version} of this worker")
            is_new = transfer is None or (transfer.version, transfer.epoch, transfer.rank) != (version, epoch, rank)
            if is_new or _has_failed(transfer):
                await self._drop(f"superseded by version {version}")
                step = self._begin(self._engine.prepare(plan, epoch, rank, deadline_s), f"prepare version {version}")
                transfer = self._transfer = _VersionTransfer(version, epoch, rank, step)
        assert transfer is not None
        await _share(transfer.prepared)

    async def receive(self, version: PolicyVersion) -> ReceiveReport:
        """Receive the version's weights beside the live ones.

        Raises:
            SupersededError: the version is not in preparation.
            InvalidArgumentError: its preparation has not answered yet.
            WeightTransferError: the transfer failed.
        """
        transfer = self._current(version)
        if transfer.received is None:
            _require(transfer.prepared, "PrepareWeights", version)
            transfer.received = self._begin(self._engine.receive(version), f"receive version {version}")
        return await _share(transfer.received)

    async def commit(self, version: PolicyVersion) -> CommitReport:
        """Load the version, which serves from then on.

        Raises:
            SupersededError: the version is not in preparation.
            InvalidArgumentError: its transfer has not answered yet.
            TaintedError: the load failed midway; the worker is tainted.
            WeightTransferError: the version was not received; the old version serves.
        """
        transfer = self._current(version)
        if transfer.committed is None:
            self._refuse_if_tainted()
            _require(transfer.received, "ReceiveWeights", version)
            transfer.committed = self._begin(self._engine.commit(version), f"commit version {version}")
            transfer.committed.add_done_callback(self._commit_ended)
        await asyncio.wait({transfer.committed})
        self._refuse_if_tainted()  # also after an error that the engine does not know, which may have come at any point
        return await _share(transfer.committed)

    async def abort(self, version: PolicyVersion, reason: str) -> None:
        """Forget a version that is in preparation. A version that is being loaded or that serves stays, and so does
        every other version."""
        async with self._turn:
            transfer = self._transfer
            if transfer is None or transfer.version != version or transfer.committed is not None:
                _logger.info("nothing to abort for version %s", version, extra={"version": str(version)})
                return
            await self._drop(reason)

    async def close(self) -> None:
        """Cancel the steps that are running."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            await _cancel(transfer.steps)

    def _current(self, version: PolicyVersion) -> _VersionTransfer:
        transfer = self._transfer
        if transfer is None or transfer.version != version:
            current = "none" if transfer is None else str(transfer.version)
            raise SupersededError(f"version {version} is not in preparation (current: {current})")
        return transfer

    def _refuse_if_tainted(self) -> None:
        if self._taint.done():
            raise self._taint.result()

    async def _drop(self, reason: str) -> None:
        """Make the engine forget the transfer, unless it is committed. A load that is running is waited for."""
        transfer = self._transfer
        if transfer is None:
            return
        if transfer.is_committing:
            await asyncio.wait(transfer.steps)
            self._refuse_if_tainted()
        if not transfer.is_committed:
            version = str(transfer.version)
            _logger.warning("version %s is dropped: %s", version, reason, extra={"version": version})
            await _cancel(transfer.steps)
            await self._engine.abort()
        self._transfer = None

    def _begin(self, step: Coroutine[Any, Any, AnswerT], name: str) -> asyncio.Task[AnswerT]:
        task = asyncio.create_task(step, name=name)
        task.add_done_callback(_log_failure)
        return task

    def _commit_ended(self, step: asyncio.Task[CommitReport]) -> None:
        error = None if step.cancelled() else step.exception()
        is_clean = error is None or (isinstance(error, RollMeshError) and not isinstance(error, TaintedError))
        if not is_clean and not self._taint.done():
            taint = TaintedError(f"{step.get_name()} failed, the engine's weights are undefined: {error}")
            taint.__cause__ = error
            self._taint.set_result(taint)


async def _share(step: asyncio.Task[AnswerT]) -> AnswerT:
    """Wait for a step. Other callers may wait for the same step, and `_drop` may cancel it.

    Raises:
        SupersededError: the step was cancelled.
    """
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        if not step.cancelled():
            raise
        raise SupersededError(f"{step.get_name()} was given up") from None


def _has_failed(transfer: _VersionTransfer | None) -> bool:
    """Whether a step has failed, so that another PREPARE of the version begins a new try."""
    return transfer is not None and any(
        step.done() and (step.cancelled() or step.exception() is not None) for step in transfer.steps
    )


def _require(step: asyncio.Task[Any] | None, name: str, version: PolicyVersion) -> None:
    """Raise unless the step before has succeeded; where it failed, raise its error."""
    if step is None or not step.done():
        raise InvalidArgumentError(f"{name} has not answered yet for version {version}", "version")
    step.result()


def _log_failure(step: asyncio.Task[Any]) -> None:
    """Log the error of a step. This also retrieves the error where no caller is left to do so."""
    error = None if step.cancelled() else step.exception()
    if error is not None:
        _logger.warning("%s failed: %s", step.get_name(), error)


async def _cancel(steps: list[asyncio.Task[Any]]) -> None:
    for step in steps:
        step.cancel()
    await asyncio.wait(steps, timeout=_CANCEL_TIMEOUT_S)
