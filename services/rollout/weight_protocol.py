"""The weight protocol on the worker's side: which call is legal when, and how the worker answers a repeated call.

::

    prepare(v) ──► receive(v) ──► commit(v)            each step runs once, as a task of this object;
        └──────────────┴──► abort(v)                   a repeated call gets the same answer

A step goes on when its call ends: a coordinator that lost the connection asks again, and gets the answer of the step
that the first call began. The old version serves until a commit has succeeded. A load that fails midway leaves parts of
two versions in the engine. The worker is then tainted, and `WeightProtocol.watch` tells the worker's owner.
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
"""Time that a cancelled step may take to release the engine."""


@dataclass
class _VersionTransfer:
    """The steps of one version from PREPARE to COMMIT. A step that has not begun is None."""

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
    """The state machine in front of one engine. Belongs to the running event loop; `close` ends its steps.

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

    @property
    def is_loading(self) -> bool:
        """Whether the engine loads a version now."""
        return self._transfer is not None and self._transfer.is_committing

    async def watch(self) -> NoReturn:
        """Wait until the worker is tainted. The owner then gives the worker up.

        Raises:
            TaintedError: always; the message names the version that could not be loaded, and the cause.
        """
        raise await asyncio.shield(self._taint)

    async def prepare(
        self, version: PolicyVersion, plan: WeightPlan, epoch: WeightEpoch, rank: int, deadline_s: float
    ) -> None:
        """Prepare for a version. Drop an older version that was not committed.

        Args:
            version: the version to prepare.
            plan: the tensors that the learner will send.
            epoch: the process group that carries the tensors.
            rank: the rank of this worker's first process in the group.
            deadline_s: seconds that the transfer may take.

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
        """Receive the version's weights beside the live weights.

        Raises:
            SupersededError: the version is not in preparation.
            InvalidArgumentError: PREPARE of the version has not answered yet.
            WeightTransferError: the transfer failed.
        """
        transfer = self._current(version)
        if transfer.received is None:
            _require(transfer.prepared, "PrepareWeights", version)
            transfer.received = self._begin(self._engine.receive(version), f"receive version {version}")
        return await _share(transfer.received)

    async def commit(self, version: PolicyVersion) -> CommitReport:
        """Load the version. The version serves as soon as it is loaded.

        Raises:
            SupersededError: the version is not in preparation.
            InvalidArgumentError: RECEIVE of the version has not answered yet.
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
        self._refuse_if_tainted()  # also after an unknown error, which may have come in the middle of the load
        return await _share(transfer.committed)

    async def abort(self, version: PolicyVersion, reason: str) -> None:
        """Forget ``version`` if the version is in preparation. A version that is loading or serves stays, and so does
        any other version."""
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
        """Make the engine forget the transfer, unless the transfer is committed. Wait for a running load first."""
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
    """Whether a step has failed. Then another PREPARE of the version begins a new try."""
    return transfer is not None and any(
        step.done() and (step.cancelled() or step.exception() is not None) for step in transfer.steps
    )


def _require(step: asyncio.Task[Any] | None, name: str, version: PolicyVersion) -> None:
    """Raise unless the earlier step has succeeded. Raise the step's own error if the step failed."""
    if step is None or not step.done():
        raise InvalidArgumentError(f"{name} has not answered yet for version {version}", "version")
    step.result()


def _log_failure(step: asyncio.Task[Any]) -> None:
    """Log the error of a step. Reading the error also marks the error as seen where no caller is left."""
    error = None if step.cancelled() else step.exception()
    if error is not None:
        _logger.warning("%s failed: %s", step.get_name(), error)


async def _cancel(steps: list[asyncio.Task[Any]]) -> None:
    for step in steps:
        step.cancel()
    await asyncio.wait(steps, timeout=_CANCEL_TIMEOUT_S)
