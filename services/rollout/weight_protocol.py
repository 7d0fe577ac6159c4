"""The engine's half of the weight protocol: which call is legal when, and what a repeated one answers.

::

    prepare(v) ──► receive(v) ──► commit(v)            each step runs once, as a task of this object;
        └──────────────┴──► abort(v)                   who repeats a call waits for, or gets, the same answer

A step does not end with the call that began it: a coordinator that lost the connection asks again and finds the step
where it is. The old version goes on serving until a commit has succeeded. A commit that fails leaves the engine with
weights of which nobody knows whose they are: the worker is tainted, and `watch` says so to its owner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

from rollmesh.errors import InvalidArgumentError, SupersededError, WeightTransferError
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, WeightEpoch, WeightPlan

_logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

_CANCEL_TIMEOUT_S = 10.0
"""How long a step may take to let go of the engine."""


class WeightReceiver(Protocol):
    """What the protocol needs of the engine. Every method ends by a deadline of its own."""

    async def prepare(self, plan: WeightPlan, epoch: WeightEpoch, rank: int, deadline_s: float) -> None: ...

    async def receive(self, version: PolicyVersion) -> ReceiveReport: ...

    async def commit(self, version: PolicyVersion) -> CommitReport: ...

    async def abort(self) -> None: ...


@dataclass
class _Transfer:
    """One version on its way. Steps that have not begun are None."""

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
        engine: the weights' receiver.
    """

    def __init__(self, engine: WeightReceiver) -> None:
        self._engine = engine
        self._transfer: _Transfer | None = None
        self._turn = asyncio.Lock()
        self._taint: asyncio.Future[WeightTransferError] = asyncio.get_running_loop().create_future()

    @property
    def is_tainted(self) -> bool:
        """Whether a commit has failed. Never changes back."""
        return self._taint.done()

    async def watch(self) -> NoReturn:
        """Wait until the worker is tainted; the owner gives it up then.

        Raises:
            WeightTransferError: always; says which version could not be loaded and why.
        """
        raise await asyncio.shield(self._taint)

    async def prepare(
        self, version: PolicyVersion, plan: WeightPlan, epoch: WeightEpoch, rank: int, deadline_s: float
    ) -> None:
        """Take a version into preparation, in place of an older one that was not committed.

        Args:
            version: the version.
            plan: what will be sent.
            epoch: the process group that will carry it.
            rank: this worker's first rank in it.
            deadline_s: for the transfer.

        Raises:
            SupersededError: a newer version is in preparation or serves already.
            WeightTransferError: the worker is tainted, or the engine cannot receive the plan.
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
                transfer = self._transfer = _Transfer(version, epoch, rank, step)
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
        """Load the version; from then on it serves.

        Raises:
            SupersededError: the version is not in preparation.
            InvalidArgumentError: its transfer has not answered yet.
            WeightTransferError: loading failed; the worker is tainted.
        """
        transfer = self._current(version)
        if transfer.committed is None:
            self._refuse_if_tainted()
            _require(transfer.received, "ReceiveWeights", version)
            transfer.committed = self._begin(self._engine.commit(version), f"commit version {version}")
            transfer.committed.add_done_callback(self._commit_ended)
        return await _share(transfer.committed)

    async def abort(self, version: PolicyVersion, reason: str) -> None:
        """Forget a version that is in preparation. Changes nothing about any other, nor about one that is being
        loaded or serves."""
        async with self._turn:
            transfer = self._transfer
            if transfer is None or transfer.version != version or transfer.committed is not None:
                _logger.info("nothing to abort for version %s", version, extra={"version": str(version)})
                return
            await self._drop(reason)

    async def close(self) -> None:
        """End the steps that are running."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            await _cancel(transfer.steps)

    def _current(self, version: PolicyVersion) -> _Transfer:
        transfer = self._transfer
        if transfer is None or transfer.version != version:
            current = "none" if transfer is None else str(transfer.version)
            raise SupersededError(f"version {version} is not in preparation (current: {current})")
        return transfer

    def _refuse_if_tainted(self) -> None:
        if self._taint.done():
            raise self._taint.result()

    async def _drop(self, reason: str) -> None:
        """Make the engine forget a transfer that is not committed; one that is being loaded is waited for."""
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
        if error is not None and not self._taint.done():
            taint = WeightTransferError(f"{step.get_name()} failed, the engine's weights are undefined: {error}")
            taint.__cause__ = error
            self._taint.set_result(taint)


async def _share(step: asyncio.Task[AnswerT]) -> AnswerT:
    """Wait for a step that others may wait for too, and that `_drop` may end.

    Raises:
        SupersededError: it was ended.
    """
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        if not step.cancelled():
            raise
        raise SupersededError(f"{step.get_name()} was given up") from None


def _has_failed(transfer: _Transfer | None) -> bool:
    """Whether a step before the commit went wrong, so that preparing the version again means a new try."""
    return transfer is not None and any(
        step.done() and (step.cancelled() or step.exception() is not None) for step in transfer.steps
    )


def _require(step: asyncio.Task[Any] | None, name: str, version: PolicyVersion) -> None:
    """The step before must have succeeded. Raises its error if it failed."""
    if step is None or not step.done():
        raise InvalidArgumentError(f"{name} has not answered yet for version {version}", "version")
    step.result()


def _log_failure(step: asyncio.Task[Any]) -> None:
    """Also retrieves the error of a step whose caller has gone."""
    error = None if step.cancelled() else step.exception()
    if error is not None:
        _logger.warning("%s failed: %s", step.get_name(), error)


async def _cancel(steps: list[asyncio.Task[Any]]) -> None:
    for step in steps:
        step.cancel()
    await asyncio.wait(steps, timeout=_CANCEL_TIMEOUT_S)
