"""Rank 0's side of the mesh's protocol, on a thread with an event loop of its own.

::

    step loop (main thread)          control thread (asyncio)
    ───────────────────────          ────────────────────────
    begin_publish, wait_over ──────► CoordinatorClient ──► coordinator
    finish_publish, report_step ──►    Membership: heartbeats, whatever the step loop does
    check ◄── run over, lost           Server: LearnerService, health

Heartbeats go on while the main thread computes. Calls that the loop must wait for block it; the others return a future.
When the control thread ends early, every call of the step loop raises its error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from rollmesh.aio.supervisor import Supervisor
from rollmesh.config.shared import RunSection
from rollmesh.errors import DeadlineError, RollMeshError, RunEndedError, UnavailableError
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.membership import Membership
from rollmesh.rpc.server import Server
from rollmesh.types import (
    Announcement,
    Heartbeat,
    PolicyVersion,
    PublishOutcome,
    Registration,
    Role,
    RunState,
    WeightEpoch,
)
from rollmesh.v1.learner_pb2_grpc import add_LearnerServiceServicer_to_server
from services.learner.phase import PhaseTracker
from services.learner.servicer import LearnerServicer

_logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

CALL_MARGIN_S = 10.0
"""Added to the deadline of a call for the way between the threads."""
FILES_POLL_S = 2.0
"""Between looks at the files of a checkpoint that is being written."""
REPORT_PATIENCE_S = 1.0
"""How long a step waits for the report of the step before, beyond the time that the step took itself."""
STOP_TIMEOUT_S = 15.0
"""For the control thread to leave the run and stop its server."""


class Control:
    """Starts with `start` and ends with `stop`; everything else may be called in between, from one thread.

    Args:
        run: name and folder of the run.
        coordinator: host:port of the coordinator.
        address: host:port of the learner's own server; port 0 takes a free one.
        name: this member's.
        tracker: what the learner's service and its heartbeats answer from.
    """

    def __init__(self, run: RunSection, coordinator: str, address: str, name: str, tracker: PhaseTracker) -> None:
        self._run_name, self._run_folder = run.name, run.folder
        self._coordinator = coordinator
        self._address = address
        self._name = name
        self._tracker = tracker
        self._loop = asyncio.new_event_loop()
        self._ready: Future[Registration] = Future()
        self._ended: Future[None] = Future()
        self._over: Future[Heartbeat] = Future()
        self._stop = asyncio.Event()
        self._failure = ""
        self._client: CoordinatorClient | None = None
        self._report: Future[None] | None = None
        self._num_lost_reports = 0
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> Registration:
        """Serve, register, begin heartbeats.

        Raises:
            ConfigError: the learner's address cannot be bound.
            UnavailableError: the coordinator does not answer.
        """
        self._thread.start()
        return self._wait(self._ready, None, "registration")

    def stop(self, failure: str = "") -> None:
        """Leave the run and stop; harmless to repeat.

        Args:
            failure: one sentence when the learner failed; fails the run.
        """
        if not self._thread.is_alive():
            return
        self._failure = failure
        with contextlib.suppress(RuntimeError):  # the thread is just ending, and its loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            _logger.error("the control thread did not end within %g s", STOP_TIMEOUT_S)

    def check(self) -> None:
        """Raise if the run is over or the coordinator is lost.

        Raises:
            RunEndedError: the run is over.
            UnavailableError: the coordinator has not answered for coordinator.member_timeout_s.
        """
        if self._ended.done():
            self._ended.result()
            raise RunEndedError("the control thread has ended")
        if self._over.done():
            last = self._over.result()
            raise RunEndedError(f"the run is over: {last.failure or last.run_state.value}")

    def begin_publish(self, announcement: Announcement, timeout_s: float) -> WeightEpoch:
        """Announce a version; returns when all members of its epoch are receiving.

        Raises:
            RollMeshError: what the coordinator answered.
        """
        with self._tracker.calling(timeout_s + CALL_MARGIN_S):
            return self._call(
                self._connected().begin_publish(announcement, timeout_s=timeout_s),
                timeout_s + CALL_MARGIN_S,
                f"the announcement of version {announcement.version}",
            )

    def finish_publish(
        self, version: PolicyVersion, digest: bytes, failure: str, timeout_s: float
    ) -> Future[PublishOutcome]:
        """Report what was sent, or why it was not; the future has the coordinator's verdict, or the error with which
        the control thread ended before it came."""
        answer = self._submit(self._connected().finish_publish(version, digest, failure=failure, timeout_s=timeout_s))
        outcome: Future[PublishOutcome] = Future()

        def end(_: Future[Any]) -> None:
            if outcome.done() or (answer.cancelled() and not self._ended.done()):
                return  # the error that the thread is ending with is still to come
            try:
                outcome.set_result(self._result(answer, f"the end of the publish of version {version}"))
            except Exception as error:  # noqa: BLE001 - belongs to whoever waits for the outcome
                outcome.set_exception(error)

        answer.add_done_callback(end)
        self._ended.add_done_callback(end)
        return outcome

    def report_step(
        self, step: int, version: PolicyVersion, metrics: Mapping[str, float], *, is_last: bool = False
    ) -> None:
        """Report a step's metrics. One that does not arrive is logged and counted: the next report says more.

        The last report ends the run, so it is repeated until it arrives or the coordinator is lost.

        Raises:
            RollMeshError: the coordinator is lost or the run over, or the coordinator refuses the last report.
        """
        self._settle_report()
        if not is_last:
            self._report = self._submit(self._connected().report_step(step, version, metrics, is_last))
            return
        while True:
            report = self._submit(self._connected().report_step(step, version, metrics, is_last))
            with contextlib.suppress(UnavailableError, DeadlineError):  # then `_connected` says if it is lost
                self._wait(report, None, "the report of the last step")
                break

    @property
    def num_lost_reports(self) -> int:
        """Reports of steps that did not arrive."""
        return self._num_lost_reports

    def _settle_report(self) -> None:
        """See whether the report before this one arrived; one that is still under way gets a moment more."""
        report, self._report = self._report, None
        if report is None:
            return
        wait([report], timeout=REPORT_PATIENCE_S)
        if report.cancel():
            reason = f"it took longer than {REPORT_PATIENCE_S:g} s"
        else:
            error = report.exception()
            if error is None:
                return
            if not isinstance(error, RollMeshError):
                raise error
            reason = str(error)
        self._num_lost_reports += 1
        _logger.warning("a step's metrics did not reach the coordinator (%s); training goes on", reason)

    def wait_over(self) -> None:
        """Wait until the run is over. The coordinator ends it: finished, stalled or failed.

        Raises:
            RunEndedError: the run failed.
        """
        last = self._wait(self._over, None, "the end of the run")
        if last.run_state is RunState.FAILED:
            raise RunEndedError(f"the run failed: {last.failure}")

    def _connected(self) -> CoordinatorClient:
        self.check()
        assert self._client is not None
        return self._client

    def _call(self, coroutine: Coroutine[Any, Any, ResultT], timeout_s: float, what: str) -> ResultT:
        return self._wait(self._submit(coroutine), timeout_s, what)

    def _submit(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, future: Future[ResultT], timeout_s: float | None, what: str) -> ResultT:
        """The future's result; unblocked as well by the end of the control thread."""
        futures: tuple[Future[Any], ...] = (future, self._ended)
        wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
        if future.done() or self._ended.done():
            return self._result(future, what)
        future.cancel()
        raise DeadlineError(f"{what} took longer than {timeout_s:g} s")

    def _result(self, future: Future[ResultT], what: str) -> ResultT:
        """Of a future that is done, or that will never be because the control thread has ended."""
        if future.done() and not future.cancelled():
            return future.result()
        self._ended.result()
        raise RunEndedError(f"the control thread ended before {what}")

    def _run(self) -> None:
        """The thread: ends when told to, or by an error that every waiter gets."""
        error: BaseException | None = None
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as caught:  # noqa: BLE001 - handed to the step loop, which raises it
            error = caught
        finally:
            self._loop.run_until_complete(_cancel_open_calls())
            self._loop.close()
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(CoordinatorClient(self._coordinator, self._name))
            service = (add_LearnerServiceServicer_to_server, LearnerServicer(self._tracker))
            server = await stack.enter_async_context(
                Server(self._address, {"rollmesh.v1.LearnerService": service}, place="learner.address")
            )
            membership = Membership(client, self._run_name, Role.LEARNER, server.address, report=self._tracker.report)
            await stack.enter_async_context(membership)
            self._client = client
            self._ready.set_result(membership.registration)
            async with Supervisor() as tasks:
                tasks.spawn(self._watch_files(), "checkpoint files")
                await self._until_stopped(membership)
            await membership.leave(self._failure)

    async def _watch_files(self) -> None:
        """Look at the files of checkpoints on a thread: a disk that hangs must not hold up the heartbeats."""
        while True:
            await asyncio.sleep(FILES_POLL_S)
            await asyncio.to_thread(self._tracker.watch_files, self._run_folder)

    async def _until_stopped(self, membership: Membership) -> None:
        """Wait for `stop`; raises when the coordinator is lost. The end of the run goes to `wait_over` and `check`."""
        over = asyncio.ensure_future(membership.wait_over())
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((over, stop), return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                self._over.set_result(over.result())
                await stop
        finally:
            over.cancel()
            stop.cancel()


async def _cancel_open_calls() -> None:
    """Cancel the calls that the step loop has started and that are not answered yet."""
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
