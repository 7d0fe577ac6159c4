"""The rollout worker's end of the Lease stream.

::

    grant(n) ──► credits not yet sent ──► stream ──► coordinator
    async for lease in stream ◄────────── stream ◄──┘

* The iteration drives everything: it connects, writes grants, reads leases and reconnects. The only tasks are one
  pending
  read and one pending write. Both outlive a cancelled iteration, because gRPC cancels a stream together with its reads
  and writes, and the leases under way would be lost.
* The outstanding credits are the granted credits minus the received leases. A new stream starts with no credits, so the
  worker grants all outstanding credits again.
* The iteration waits without a deadline for the coordinator to have work. The heartbeats (`rollmesh.rpc.membership`)
  watch the coordinator's life. The iteration gives up only when no stream could be opened for ``lost_timeout_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from rollmesh.aio.awake import AwakeClock
from rollmesh.errors import DeadlineError, RunEndedError, UnavailableError, UnknownMemberError
from rollmesh.rpc.retry import Backoff
from rollmesh.rpc.status_codes import translate_errors
from rollmesh.types import Lease
from rollmesh.wire.control import Caller, CreditGrant, grant_to_proto, lease_from_proto

_logger = logging.getLogger(__name__)

_BACKOFF = Backoff(maximum_s=1.0)
_CONNECT_TIMEOUT_S = 5.0
_BETWEEN_FAILURES_S = 15.0
"""The longest time between two failures of one series. A longer gap does not count as time of failing."""
_STABLE_S = 5.0
"""A stream that stood for this time ends a series of failures."""


class LeaseStream:
    """Asynchronous iterator over the leases of one worker, for one consumer; `close` it when done.

    Iteration ends after `close` and when the run has ended.

    Args:
        method: ``stub.Lease``.
        caller: the worker that calls.
        peer: the name of the coordinator, for errors and logs.
        lost_timeout_s: the iteration raises when no stream could be opened for this time.
        backoff: the pauses between two streams.
    """

    def __init__(
        self,
        method: Callable[[], Any],
        caller: Caller,
        *,
        peer: str,
        lost_timeout_s: float,
        backoff: Backoff = _BACKOFF,
    ) -> None:
        self._method = method
        self._caller = caller
        self._peer = peer
        self._lost_timeout_s = lost_timeout_s
        self._backoff = backoff
        self._pauses = backoff.pauses()
        self._num_outstanding = 0
        self._num_unsent = 0
        self._has_news = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._call: Any = None
        self._reading: asyncio.Task[Any] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._connect_by = 0.0
        self._opened_at: float | None = None
        self._failing_since: float | None = None
        self._clock = AwakeClock(_BETWEEN_FAILURES_S)

    @property
    def num_outstanding(self) -> int:
        """The number of granted credits minus the number of received leases."""
        return self._num_outstanding

    def grant(self, num_leases: int) -> None:
        """Ask for ``num_leases`` more leases. The iteration sends the credits, and sends them again after a
        reconnect."""
        assert num_leases >= 0, "credits cannot be taken back"
        self._num_outstanding += num_leases
        self._num_unsent += num_leases
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Lease:
        """Wait for the next lease and return it.

        Raises:
            UnavailableError: no stream could be opened for ``lost_timeout_s``.
            SupersededError: another incarnation of the worker has taken this worker's place.
            RollMeshError: the coordinator refuses the stream for another lasting reason, or sent a bad message.
        """
        while not self._closing.is_set():
            try:
                message = await self._exchange()
            except RunEndedError:
                await self.close()
            except (UnavailableError, DeadlineError, UnknownMemberError) as error:
                # The heartbeats of an unknown member are about to register the member again.
                await self._disconnect()
                await self._pause(error)
            else:
                self._num_outstanding = max(0, self._num_outstanding - 1)
                self._forget_failures()
                return lease_from_proto(message)
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the stream and the iteration. The worker keeps the received leases. Safe to repeat."""
        self._closing.set()
        self._wake()
        await self._disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _exchange(self) -> Any:
        """Write grants as they come, until a message has arrived. Return the message."""
        if self._call is None:
            self._open()
        while True:
            self._has_news = asyncio.get_running_loop().create_future()
            if self._num_unsent and (self._writing is None or self._writing.done()):
                self._write(CreditGrant(None, self._num_unsent))
            if self._reading is None:
                raise self._cut()
            waits: set[asyncio.Future[Any]] = {self._reading, self._has_news}
            if self._writing is not None and not self._writing.done():
                waits.add(self._writing)
            done, _ = await asyncio.wait(waits, timeout=self._connect_left_s(), return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise UnavailableError(f"{self._peer}: no connection within {_CONNECT_TIMEOUT_S:g} s")
            if self._reading is not None and self._reading.done():
                return self._take()

    def _connect_left_s(self) -> float | None:
        """Return the seconds left to connect; None once the stream is connected, which the end of the first write
        shows."""
        if self._opened_at is not None:
            return None
        return max(0.0, self._connect_by - asyncio.get_running_loop().time())

    def _take(self) -> Any:
        """Return the message that was read, and start the next read."""
        assert self._reading is not None
        if self._reading.cancelled():
            raise self._cut()
        with translate_errors(self._peer):
            message = self._reading.result()
        if message is grpc.aio.EOF:
            raise UnavailableError(f"{self._peer}: the coordinator ended the lease stream")
        self._read()
        return message

    def _open(self) -> None:
        self._call = self._method()
        self._connect_by = asyncio.get_running_loop().time() + _CONNECT_TIMEOUT_S
        self._write(CreditGrant(self._caller, self._num_outstanding))
        self._read()

    def _read(self) -> None:
        self._reading = asyncio.create_task(self._call.read(), name="lease stream read")

    def _write(self, grant: CreditGrant) -> None:
        self._num_unsent = 0
        self._writing = asyncio.create_task(self._send(grant), name="lease stream write")

    async def _send(self, grant: CreditGrant) -> None:
        # Where the stream has ended, the read raises the reason.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(grant_to_proto(grant))
            if self._opened_at is None:
                self._opened_at = asyncio.get_running_loop().time()

    def _cut(self) -> UnavailableError:
        return UnavailableError(f"{self._peer}: the lease stream was cut on this side")

    async def _disconnect(self) -> None:
        call, self._call = self._call, None
        tasks = {task for task in (self._reading, self._writing) if task is not None}
        self._reading = self._writing = None
        if call is not None:
            call.cancel()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # Marks the error as seen; the iteration has raised the error that matters.

    async def _pause(self, error: Exception) -> None:
        """Wait before the next stream. Raise if no stream could be opened for ``lost_timeout_s``."""
        if self._opened_at is not None and asyncio.get_running_loop().time() - self._opened_at > _STABLE_S:
            self._forget_failures()
        self._opened_at = None
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        failing_s = now - self._failing_since
        if failing_s > self._lost_timeout_s:
            raise UnavailableError(f"{self._peer}: no lease stream for {failing_s:.1f} s ({error})") from error
        pause_s = max(next(self._pauses), getattr(error, "retry_after_s", 0.0))
        _logger.info("%s; next lease stream in %.1f s", error, pause_s)
        # Not `wait_for`, which in Python 3.11 may lose a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._closing.wait()

    def _forget_failures(self) -> None:
        self._failing_since = None
        self._pauses = self._backoff.pauses()

    def _wake(self) -> None:
        if not self._has_news.done():
            self._has_news.set_result(None)
