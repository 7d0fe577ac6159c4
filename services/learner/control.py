"""The learner's connection to the coordinator, on a thread of rank 0 with an event loop of its own.

::

    step loop (main thread)          control thread (asyncio)
    ───────────────────────          ────────────────────────
    begin_publish, attend ─────────► CoordinatorClient ──► coordinator
    finish_publish, report_step ──►    Membership: heartbeats, whatever the step loop does
    check ◄── run over, lost           Server: LearnerService, health

Heartbeats go on while the main thread computes. A call blocks the step loop only where the loop needs the answer. When
the control thread ends with an error, every call of the step loop raises this error.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import threading
import time
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
    MemberReport,
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
"""Time added to the deadline of a call, for the way between the threads."""
FILES_POLL_S = 2.0
"""Pause between two looks at the files of a checkpoint that is being written."""
REPORT_PATIENCE_S = 1.0
"""Longest time that the report of a step waits until the report of the step before has arrived."""
WORD_POLL_S = 0.2
"""Pause between two looks at what the coordinator wants."""
STOP_TIMEOUT_S = 15.0
"""Longest time in which the control thread leaves the run and stops its server."""


class Word(enum.Enum):
    """What the coordinator wants from a learner that has made its last step."""

    NONE = b"none"
    PUBLISH = b"publish"
    """A rollout worker waits for the last version."""
    OVER = b"over"


class Control:
    """The learner's connection to the coordinator.

    Call `start` first and `stop` last. One thread may call the other methods in between.

    Args:
        run: name and folder of the run.
        coordinator: host:port of the coordinator.
        address: host:port of the learner's own server; port 0 takes a free port.
        name: the name of this member.
        tracker: the phase and the progress that the learner's service and its heartbeats report.
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
        self._failure, self._is_replaceable = "", False
        self._client: CoordinatorClient | None = None
        self._membership: Membership | None = None
        self._is_publish_wanted = False
        self._report: Future[None] | None = None
        self._last_report: tuple[int, PolicyVersion, Mapping[str, float], bool] | None = None
        self._num_lost_reports = 0
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> Registration:
        """Start the learner's server, register, and begin heartbeats. Return the registration.

        Raises:
            ConfigError: the learner's address cannot be bound.
            UnavailableError: the coordinator does not answer.
        """
        self._thread.start()
        return self._wait(self._ready, None, "registration")

    def stop(self, failure: str = "", *, is_replaceable: bool = False) -> None:
        """Leave the run and end the control thread. A second call is harmless.

        Args:
            failure: the reason in one sentence if the learner failed, which fails the run; else empty.
            is_replaceable: whether a new learner may take this learner's place, so that the run goes on.
        """
        if not self._thread.is_alive():
            return
        self._failure, self._is_replaceable = failure, is_replaceable
        with contextlib.suppress(RuntimeError):  # the thread is just ending, and its loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            _logger.error("the control thread did not end within %g s", STOP_TIMEOUT_S)

    def check(self) -> None:
        """Raise an error if the run is over or the coordinator is lost.

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

    def is_publish_wanted(self) -> bool:
        """Return whether a rollout worker waits for the present version, as of the last heartbeat."""
        return self._is_publish_wanted

    @property
    def committed_version(self) -> PolicyVersion | None:
        """The committed version, as of the last heartbeat; None before the first commit."""
        return None if self._membership is None else self._membership.committed_version

    def begin_publish(self, announcement: Announcement, timeout_s: float) -> WeightEpoch:
        """Announce a version. Return its weight epoch when all members of the epoch are ready to receive.

        Raises:
            RollMeshError: the coordinator's refusal, or the error with which the control thread ended.
            DeadlineError: the coordinator did not answer in time.
        """
        self._is_publish_wanted = False
        with self._tracker.calling(timeout_s + CALL_MARGIN_S):
            return self._call(
                self._connected().begin_publish(announcement, timeout_s=timeout_s),
                timeout_s + CALL_MARGIN_S,
                f"the announcement of version {announcement.version}",
            )

    def finish_publish(
        self, version: PolicyVersion, digest: bytes, failure: str, timeout_s: float
    ) -> Future[PublishOutcome]:
        """Tell the coordinator that the bytes were sent, or why they were not sent.

        Args:
            version: the announced version.
            digest: the digest of the transfer; empty after a failure.
            failure: the reason in one sentence if the broadcast failed; else empty.
            timeout_s: deadline of the call.

        Returns:
            A future with the coordinator's outcome. If the control thread ends before, the future has its error.
        """
        answer = self._submit(self._connected().finish_publish(version, digest, failure=failure, timeout_s=timeout_s))
        outcome: Future[PublishOutcome] = Future()

        def end(_: Future[Any]) -> None:
            if outcome.done() or (answer.cancelled() and not self._ended.done()):
                return  # the control thread is about to end, and then `_ended` has its error
            try:
                outcome.set_result(self._result(answer, f"the end of the publish of version {version}"))
            except Exception as error:  # noqa: BLE001 - raised where the outcome is awaited
                outcome.set_exception(error)

        answer.add_done_callback(end)
        self._ended.add_done_callback(end)
        return outcome

    def report_step(
        self, step: int, version: PolicyVersion, metrics: Mapping[str, float], *, is_last: bool = False
    ) -> None:
        """Report the metrics of a step. A lost report is logged and counted, and is not sent again.

        The last report ends the run. So the last report is sent again until it arrives or the coordinator is lost.

        Raises:
            RollMeshError: the coordinator is lost, the run is over, or the coordinator refuses the last report.
        """
        self._settle_report()
        self._last_report = step, version, metrics, is_last
        if not is_last:
            self._report = self._submit(self._connected().report_step(step, version, metrics, is_last))
            return
        while True:
            report = self._submit(self._connected().report_step(step, version, metrics, is_last))
            with contextlib.suppress(UnavailableError, DeadlineError):  # `_connected` raises if it is lost
                self._wait(report, None, "the report of the last step")
                break

    @property
    def num_lost_reports(self) -> int:
        """Return the number of reports that did not arrive."""
        return self._num_lost_reports

    def _settle_report(self) -> None:
        """Count the report of the step before as lost, unless it arrives within `REPORT_PATIENCE_S`."""
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

    def attend(self, timeout_s: float) -> Word:
        """Wait after the last step for the coordinator's word, for at most ``timeout_s``.

        Raises:
            RunEndedError: the run failed.
            UnavailableError: the coordinator is lost.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            futures: tuple[Future[Any], ...] = (self._over, self._ended)
            wait(futures, timeout=WORD_POLL_S, return_when=FIRST_COMPLETED)
            if self._over.done() or self._ended.done():
                last = self._result(self._over, "the end of the run")
                if last.run_state is RunState.FAILED:
                    raise RunEndedError(f"the run failed: {last.failure}")
                return Word.OVER
            if self._is_publish_wanted:
                return Word.PUBLISH
            if time.monotonic() >= deadline:
                return Word.NONE

    def _connected(self) -> CoordinatorClient:
        self.check()
        assert self._client is not None
        return self._client

    def _call(self, coroutine: Coroutine[Any, Any, ResultT], timeout_s: float, what: str) -> ResultT:
        return self._wait(self._submit(coroutine), timeout_s, what)

    def _submit(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, future: Future[ResultT], timeout_s: float | None, what: str) -> ResultT:
        """Wait for the future and return its result. The end of the control thread ends the wait, too."""
        futures: tuple[Future[Any], ...] = (future, self._ended)
        wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
        if future.done() or self._ended.done():
            return self._result(future, what)
        future.cancel()
        raise DeadlineError(f"{what} took longer than {timeout_s:g} s")

    def _result(self, future: Future[ResultT], what: str) -> ResultT:
        """Return the result of a future that is done. Else raise the error with which the control thread ended."""
        if future.done() and not future.cancelled():
            return future.result()
        self._ended.result()
        raise RunEndedError(f"the control thread ended before {what}")

    def _run(self) -> None:
        """Run the control thread until `stop` is called or an error ends it. Every waiting call raises the error."""
        error: BaseException | None = None
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as caught:  # noqa: BLE001 - the step loop raises it
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
            membership = Membership(
                client,
                self._run_name,
                Role.LEARNER,
                server.address,
                report=self._tracker.report,
                on_answer=self._heard,
                on_return=self._report_again,
            )
            await stack.enter_async_context(membership)
            self._client, self._membership = client, membership
            self._ready.set_result(membership.registration)
            async with Supervisor() as tasks:
                tasks.spawn(self._watch_files(), "checkpoint files")
                await self._until_stopped(membership)
            await membership.leave(self._failure, is_replaceable=self._is_replaceable)

    def _heard(self, _report: MemberReport, heartbeat: Heartbeat) -> None:
        self._is_publish_wanted = heartbeat.should_publish

    def _report_again(self) -> None:
        """Send the last report once more: the coordinator was started again, and does not know the step."""
        if self._last_report is not None and self._client is not None:
            again = asyncio.ensure_future(self._client.report_step(*self._last_report))
            again.add_done_callback(_log_lost)

    async def _watch_files(self) -> None:
        """Look at the files of checkpoints, again and again.

        The look happens on another thread, because a disk that hangs must not delay the heartbeats.
        """
        while True:
            await asyncio.sleep(FILES_POLL_S)
            await asyncio.to_thread(self._tracker.watch_files, self._run_folder)

    async def _until_stopped(self, membership: Membership) -> None:
        """Wait until `stop` is called. Pass the end of the run on to `wait_over` and `check`.

        Raises:
            UnavailableError: the coordinator is lost.
        """
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


def _log_lost(report: asyncio.Future[None]) -> None:
    if not report.cancelled() and (error := report.exception()) is not None:
        _logger.warning("the coordinator that was started again did not take the last report: %s", error)


async def _cancel_open_calls() -> None:
    """Cancel the calls of the step loop that the coordinator has not answered yet."""
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
