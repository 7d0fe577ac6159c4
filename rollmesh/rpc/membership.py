"""Keeps a service a member of the run: registers the service, sends heartbeats, and leaves at the end.

::

    enter: register ──► heartbeat task: every interval ──► run state, committed version
                            │ with the member's report of its work
                            │ the coordinator does not know the member: register again
                            │ the coordinator is silent for member_timeout: wait_over raises
    exit:  stop heartbeats ──► leave

The owner awaits `Membership.wait_over` as long as it works. `wait_over` tells the owner of the end of the run, and of
any failure of the heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rollmesh.aio.awake import AwakeClock, boot_time
from rollmesh.errors import (
    DeadlineError,
    RollMeshError,
    RunEndedError,
    StartAgainError,
    UnavailableError,
    UnknownMemberError,
)
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import Heartbeat, MemberReport, PolicyVersion, Registration, Role, RunState

_logger = logging.getLogger(__name__)

_HEARTBEAT_TIMEOUT_S = 5.0
_BUSY_S = 1.0
"""Time by which an awake process may delay its heartbeat."""
_LEAVE_TIMEOUT_S = 5.0
_LEAVE_GONE_TIMEOUT_S = 2.0
"""Time for leaving a coordinator that was lost, or that may be gone because the run is over."""
_MAX_FAILURE_CHARS = 500


class Membership:
    """Membership for the length of an ``async with`` block.

    Leaving the block leaves the run, unless `leave` was called before. An exception of the block is reported as the
    member's failure and fails the run, unless it is a StartAgainError. A cancellation is not reported: it asks the
    process to end in order.

    Args:
        client: the member's connection to the coordinator. The caller closes the client.
        run_id: the run's name.
        role: the member's role.
        address: the "host:port" of the member's own server.
        num_weight_ranks: the number of the member's processes that take part in weight transfers.
        report: returns how the member's work moves; called for every heartbeat.
        on_answer: called with the report and the answer of every heartbeat.
        serving: returns the version that a rollout worker's engine serves; called for every registration.
        on_return: called when the member has registered again, because the coordinator did not know the member.
        register_timeout_s: time that the coordinator may take to answer the registration.
        clock: returns seconds, and goes on while this process is stopped. The time for which the process was stopped
            does not count as the coordinator's silence.

    Raises:
        UnavailableError, DeadlineError: on entering, if the coordinator did not answer in time.
        InvalidArgumentError: on entering, if the coordinator serves another run.
        RunEndedError: on entering, if the run is over.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        run_id: str,
        role: Role,
        address: str,
        num_weight_ranks: int = 0,
        *,
        report: Callable[[], MemberReport] = MemberReport,
        on_answer: Callable[[MemberReport, Heartbeat], None] = lambda report, heartbeat: None,
        serving: Callable[[], PolicyVersion | None] = lambda: None,
        on_return: Callable[[], None] = lambda: None,
        register_timeout_s: float = 60.0,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._role = role
        self._address = address
        self._num_weight_ranks = num_weight_ranks
        self._report = report
        self._on_answer = on_answer
        self._serving = serving
        self._on_return = on_return
        self._register_timeout_s = register_timeout_s
        self._clock = clock
        self._registration: Registration | None = None
        self._last: Heartbeat | None = None
        self._over: asyncio.Future[Heartbeat] | None = None
        self._heartbeats: asyncio.Task[None] | None = None
        self._has_left = False

    @property
    def registration(self) -> Registration:
        """The coordinator's latest answer to a registration."""
        assert self._registration is not None, "the membership has not been entered"
        return self._registration

    @property
    def run_state(self) -> RunState:
        """The state of the run, as of the last heartbeat."""
        return RunState.STARTING if self._last is None else self._last.run_state

    @property
    def committed_version(self) -> PolicyVersion | None:
        """The committed version, as of the last heartbeat; None before the first commit."""
        return self.registration.committed_version if self._last is None else self._last.committed_version

    @property
    def failure(self) -> str:
        """The reason why the run failed; empty where the run has not failed."""
        return "" if self._last is None else self._last.failure

    async def wait_over(self) -> Heartbeat:
        """Wait for the end of the run without a deadline.

        Returns:
            The heartbeat that told of the end: FINISHED, or FAILED with the failure.

        Raises:
            UnavailableError: the coordinator was silent for longer than the member timeout.
            SupersededError: another incarnation of this member has taken this member's place.
            RunEndedError: the coordinator has ended the run and forgotten the run.
        """
        assert self._over is not None, "the membership has not been entered"
        return await asyncio.shield(self._over)

    async def leave(self, failure: str = "", *, is_replaceable: bool = False) -> None:
        """Stop the heartbeats and leave the run. Never fails. Only the first call has an effect.

        Args:
            failure: why the member cannot go on; empty where the member leaves in order.
            is_replaceable: whether a new process may take the member's place, so that the run goes on.
        """
        if self._has_left:
            return
        self._has_left = True
        is_lost = await self._stop_heartbeats()
        try:
            timeout_s = _LEAVE_GONE_TIMEOUT_S if is_lost or self.run_state.is_over else _LEAVE_TIMEOUT_S
            await self._client.leave(failure, is_replaceable=is_replaceable, timeout_s=timeout_s)
        except RollMeshError as error:
            _logger.warning("could not tell the coordinator of leaving: %s", error)

    async def __aenter__(self) -> Self:
        _logger.info("registering with the %s", self._client.peer)
        try:
            self._registration = await self._register(self._register_timeout_s)
        except UnavailableError as error:
            problem = f"did not take a registration within {self._register_timeout_s:g} s ({error})"
            raise UnavailableError(
                f"the {self._client.peer} {problem}; start it, or correct coordinator.address"
            ) from error
        self._over = asyncio.get_running_loop().create_future()
        self._heartbeats = asyncio.create_task(self._beat(), name="heartbeats")
        self._heartbeats.add_done_callback(self._heartbeats_ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.leave(_failure_sentence(error), is_replaceable=isinstance(error, StartAgainError))

    async def _register(self, timeout_s: float) -> Registration:
        return await self._client.register(
            self._run_id, self._role, self._address, self._num_weight_ranks, self._serving(), timeout_s=timeout_s
        )

    async def _beat(self) -> None:
        """Send heartbeats until cancelled. The coordinator may be silent once the run is over."""
        registration = self.registration
        answer_s = min(_HEARTBEAT_TIMEOUT_S, registration.member_timeout_s / 3)
        longest_interval_s = max(registration.heartbeat_interval_s, registration.member_timeout_s / 6)
        clock = AwakeClock(longest_interval_s + answer_s + _BUSY_S, self._clock)
        answered_at = clock()
        while True:
            try:
                await self._beat_once(answer_s)
                answered_at = clock()
            except (UnavailableError, DeadlineError) as error:
                silent_s = clock() - answered_at
                if not self.run_state.is_over and silent_s > self.registration.member_timeout_s:
                    message = f"{self._client.peer}: no answer for {silent_s:.1f} s ({error})"
                    raise UnavailableError(message) from error
            if slept_s := clock.take_slept_s():
                _logger.warning("this process was stopped for %.0f s", slept_s)
            told_s = 0.0 if self._last is None else self._last.interval_s
            await asyncio.sleep(told_s or self.registration.heartbeat_interval_s)

    async def _beat_once(self, timeout_s: float) -> None:
        report = self._report()
        try:
            heartbeat = await self._client.heartbeat(report, timeout_s=timeout_s)
            self._take_answer(heartbeat)
            self._on_answer(report, heartbeat)
        except UnknownMemberError:
            if self.run_state.is_over:
                return
            _logger.warning("the coordinator does not know this member any more; registering again")
            self._registration = await self._register(_HEARTBEAT_TIMEOUT_S)
            self._on_return()

    def _take_answer(self, heartbeat: Heartbeat) -> None:
        if heartbeat.run_state is not self.run_state:
            _logger.info("the run is %s", heartbeat.run_state.value)
        self._last = heartbeat
        assert self._over is not None
        if heartbeat.run_state.is_over and not self._over.done():
            self._over.set_result(heartbeat)

    def _heartbeats_ended(self, task: asyncio.Task[None]) -> None:
        """Hand the failure of the heartbeats to `wait_over`."""
        assert self._over is not None
        if not task.cancelled() and (error := task.exception()) is not None and not self._over.done():
            self._over.set_exception(error)

    async def _stop_heartbeats(self) -> bool:
        """End the heartbeats' task. Return whether the heartbeats had failed before."""
        if self._heartbeats is None:
            return False
        self._heartbeats.cancel()
        await asyncio.wait({self._heartbeats})
        has_failed = not self._heartbeats.cancelled()
        assert self._over is not None
        with contextlib.suppress(asyncio.InvalidStateError, asyncio.CancelledError):
            self._over.exception()  # Marks the failure as seen where nobody awaits the end of the run.
        return has_failed


def _failure_sentence(error: BaseException | None) -> str:
    """Return the failure that the coordinator hears of a block that ended with ``error``; empty for no failure."""
    if not isinstance(error, Exception) or isinstance(error, RunEndedError):
        return ""
    sentence = str(error) if isinstance(error, RollMeshError) else f"{type(error).__name__}: {error}"
    return " ".join(sentence.split())[:_MAX_FAILURE_CHARS] or type(error).__name__
