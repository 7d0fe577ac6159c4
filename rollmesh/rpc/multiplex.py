"""Carries many concurrent calls over one bidirectional stream. A request id matches each answer to its call.

::

    call() ──► unwritten ──► writer ──►┐                    ┌──► reader ──► the future of that call()
                                       └── stream to peer ──┘
    the runner opens a stream when a call waits to be written, and opens the next stream when a stream breaks

* A call waits for one of ``max_in_flight`` places, then for its answer. A place becomes free when its call is answered,
  fails, times out or is cancelled. So a call waits for a place no longer than the earlier calls may take.
* The writer waits for calls and for the stream's flow control. The reader waits for the peer. Neither needs a deadline,
  because every call has a deadline: the writer does not write a call that is over, and the reader drops a late answer.
* A broken stream fails the calls that were written to the stream, because nobody knows which calls the peer has seen.
  The calls that are not yet written wait for the next stream.

Only the writer and the reader touch the stream: cancelling a read or a write of gRPC cancels the whole stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from rollmesh.errors import DeadlineError, InvalidArgumentError, RollMeshError, UnavailableError
from rollmesh.rpc.retry import Backoff
from rollmesh.rpc.status_codes import error_from_rpc
from rollmesh.wire.limits import MAX_MESSAGE_BYTES

_logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

_BACKOFF = Backoff(maximum_s=1.0)

_INCURABLE = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
"""Statuses with which a peer would also answer the next stream."""


class _PendingCall(Generic[RequestT, ResponseT]):
    """A call that has a place and no answer. ``is_written`` is true as soon as the peer may have seen the request."""

    __slots__ = ("answer", "is_written", "request")

    def __init__(self, request: RequestT) -> None:
        self.request = request
        self.answer: asyncio.Future[ResponseT] = asyncio.get_running_loop().create_future()
        self.is_written = False

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class StreamCaller(Generic[RequestT, ResponseT]):
    """Makes calls over one stream, and opens the stream anew when it breaks. Belongs to the running event loop.

    The first call connects.

    Args:
        method: the stream's method of a generated stub, e.g. ``stub.Score``.
        peer: the name of the peer, for errors and logs.
        max_in_flight: the most calls that may be unanswered at the same time.
        backoff: the pauses between two streams.
        response_id: returns the request id of an answer; None takes the field ``request_id``.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        *,
        peer: str,
        max_in_flight: int = 256,
        backoff: Backoff = _BACKOFF,
        response_id: Callable[[Any], str] | None = None,
    ) -> None:
        self._method = method
        self._peer = peer
        self._backoff = backoff
        self._response_id = response_id or _request_id
        self._places = asyncio.Semaphore(max_in_flight)
        self._ids = itertools.count(1)
        self._pending: dict[str, _PendingCall[RequestT, ResponseT]] = {}
        self._unwritten: dict[str, _PendingCall[RequestT, ResponseT]] = {}
        self._has_news = asyncio.Event()
        self._is_closing = asyncio.Event()
        self._is_connected = False
        self._num_answers = 0
        self._runner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(timeout_s=5.0 if error is None else 0.0)

    @property
    def num_in_flight(self) -> int:
        """The number of calls that have a place and no answer yet."""
        return len(self._pending)

    async def call(self, build_request: Callable[[str], RequestT], timeout_s: float) -> ResponseT:
        """Send one request and wait for its answer. The request must be safe to repeat.

        Args:
            build_request: makes the request out of a request id. `call` calls this function once, when the call has
                a place.
            timeout_s: time for the answer, counted from the moment at which the call has a place.

        Raises:
            UnavailableError: the stream broke after the request was written, no stream could be opened in time, or
                the `StreamCaller` is closed.
            DeadlineError: the peer did not answer in time.
            InvalidArgumentError: the request is larger than a message may be.
            RollMeshError: the peer refuses the stream for good.
        """
        async with self._places:
            if self._is_closing.is_set():
                raise UnavailableError(f"{self._peer}: the stream is closed")
            request_id = str(next(self._ids))
            call: _PendingCall[RequestT, ResponseT] = _PendingCall(build_request(request_id))
            self._check_size(call.request)
            self._pending[request_id] = self._unwritten[request_id] = call
            self._has_news.set()
            self._ensure_runner()
            try:
                async with asyncio.timeout(timeout_s):
                    return await call.answer
            except TimeoutError:
                if call.is_written:
                    raise DeadlineError(f"{self._peer}: no answer within {timeout_s:g} s") from None
                raise UnavailableError(f"{self._peer}: no connection within {timeout_s:g} s") from None
            finally:
                self._pending.pop(request_id, None)
                self._unwritten.pop(request_id, None)

    def _check_size(self, request: RequestT) -> None:
        """Refuse a request that is too large: the request would break the stream for all calls."""
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise InvalidArgumentError(
                f"{self._peer}: a request of {size} bytes is above the {MAX_MESSAGE_BYTES} allowed"
            )

    async def close(self, timeout_s: float = 5.0) -> None:
        """Refuse new calls, half-close the stream, and wait ``timeout_s`` for the answers of the calls in flight.

        Calls without an answer then fail with `UnavailableError`. Safe to repeat.
        """
        self._is_closing.set()
        self._has_news.set()
        if self._runner is not None:
            try:
                if self._pending or self._is_connected:
                    await asyncio.wait({self._runner}, timeout=timeout_s)
            finally:
                self._runner.cancel()
            await asyncio.wait({self._runner})
        for call in self._pending.values():
            call.fail(UnavailableError(f"{self._peer}: the stream was closed before the answer"))

    def _ensure_runner(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run(), name=f"stream to {self._peer}")
            self._runner.add_done_callback(self._runner_ended)

    def _runner_ended(self, runner: asyncio.Task[None]) -> None:
        """Give the error of a failed runner to the calls in flight. A runner that raises is a defect.

        The next call starts a new runner.
        """
        if not runner.cancelled() and (error := runner.exception()) is not None:
            for call in self._pending.values():
                call.fail(error)

    async def _run(self) -> None:
        """Open one stream after the other, until the caller is closed and no call waits to be written."""
        pauses = self._backoff.pauses()
        while await self._has_work():
            num_answers = self._num_answers
            error = await self._run_stream()
            if self._num_answers > num_answers:
                pauses = self._backoff.pauses()
            if not self._is_closing.is_set():
                pause_s = max(next(pauses), error.retry_after_s)
                _logger.info("%s; next stream in %.1f s", error, pause_s)
                # Not `wait_for`, which in Python 3.11 may lose a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._is_closing.wait()

    async def _has_work(self) -> bool:
        """Wait for a call to write. Return False if the caller is closed and no call waits."""
        while not self._unwritten:
            if self._is_closing.is_set():
                return False
            self._has_news.clear()
            await self._has_news.wait()
        return True

    async def _run_stream(self) -> UnavailableError:
        """Run one stream from its opening to its end. Fail the calls that were written to it and not answered.

        Returns:
            The error that describes how the stream ended.
        """
        stream = self._method(wait_for_ready=True)
        writer = asyncio.create_task(self._write(stream), name=f"writer to {self._peer}")
        reader = asyncio.create_task(self._read(stream), name=f"reader from {self._peer}")
        try:
            await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and writer.exception() is None:
                # Half-closed: the peer answers the calls that it holds, then ends the stream. `close` bounds this wait.
                await asyncio.wait({reader})
            for task in (reader, writer):
                if task.done():
                    task.result()
            ending, is_incurable = await self._ending(stream)
        finally:
            self._is_connected = False
            stream.cancel()
            for task in (writer, reader):
                task.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)
        for call in self._pending.values():
            if is_incurable:
                call.fail(RollMeshError(str(ending)))
            elif call.is_written:
                call.fail(UnavailableError(str(ending), ending.retry_after_s))
        return ending

    async def _write(self, stream: Any) -> None:
        """Write calls as they come. Half-close the stream and return when closed; also return when the stream
        breaks."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await stream.wait_for_connection()
            self._is_connected = True
            while True:
                if self._unwritten:
                    call = self._unwritten.pop(next(iter(self._unwritten)))
                    call.is_written = True
                    await stream.write(call.request)
                elif self._is_closing.is_set():
                    await stream.done_writing()
                    return
                else:
                    self._has_news.clear()
                    await self._has_news.wait()

    async def _read(self, stream: Any) -> None:
        """Hand each answer to its call. Return when the stream has ended or broken."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (response := await stream.read()) is not grpc.aio.EOF:
                self._num_answers += 1
                call = self._pending.get(self._response_id(response))
                if call is None:
                    _logger.debug("%s: dropped an answer that nobody waits for", self._peer)
                elif not call.answer.done():
                    call.answer.set_result(response)

    async def _ending(self, stream: Any) -> tuple[UnavailableError, bool]:
        """Return the error that ended a stream, and whether the next stream would end in the same way."""
        code = await stream.code()
        if code is grpc.StatusCode.OK:
            return UnavailableError(f"{self._peer}: the server ended the stream"), False
        status = grpc.aio.AioRpcError(
            code, await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
        )
        error = error_from_rpc(status)
        return UnavailableError(
            f"{self._peer}: stream broke: {error}", getattr(error, "retry_after_s", 0.0)
        ), code in _INCURABLE


def _request_id(response: Any) -> str:
    return str(response.request_id)
