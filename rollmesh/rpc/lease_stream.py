"""The rollout worker's end of the Lease stream.

::

    grant(n) ──► credits not yet sent ──► stream ──► coordinator
    async for lease in stream ◄────────── stream ◄──┘

* Whoever iterates drives everything: connects, writes grants, reads leases, reconnects. There are no tasks besides
  the one pending read and write. They outlive a cancelled iteration, because gRPC cancels a stream together with its
  reads and writes, and leases under way would be lost with it.
* Outstanding credits are those granted minus the leases received. A stream starts at nothing, so a new one grants
  all of them again.
* Iterating waits without a deadline: for the coordinator to have work. The coordinator's life is watched by the
  heartbeats (`rollmesh.rpc.membership`); here only a stream that cannot be had is given up, after ``lost_timeout_s``.
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
"""Longer than one failure comes after another; what lies between two that are farther apart counts as no failing."""
_STABLE_S = 5.0
"""A stream that stood for so long ends a series of failures."""


class LeaseStream:
    """Asynchronous iterator over the leases of one worker, for one consumer; `close` it when done.

    Iteration ends after `close` and when the run has ended.

    Args:
        method: ``stub.Lease``.
        caller: the worker.
        peer: who is called, for errors and logs.
        lost_timeout_s: how long no stream may come about before iteration raises.
        backoff: pauses between streams.
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
        """Credits granted minus leases received."""
        return self._num_outstanding

    def grant(self, num_leases: int) -> None:
        """Ask for ``num_leases`` more. They are sent by whoever iterates, again after every reconnect."""
        assert num_leases >= 0, "credits cannot be taken back"
        self._num_outstanding += num_leases
        self._num_unsent += num_leases
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Lease:
        """The next lease.

        Raises:
            UnavailableError: no stream came about for ``lost_timeout_s``.
            SupersededError: another incarnation of the worker has taken its place.
            RollMeshError: the coordinator refuses the stream for another lasting reason, or sent nonsense.
        """
        while not self._closing.is_set():
            try:
                message = await self._exchange()
            except RunEndedError:
                await self.close()
            except (UnavailableError, DeadlineError, UnknownMemberError) as error:
                # An unknown member is one that its heartbeats are about to register again.
                await self._disconnect()
                await self._pause(error)
            else:
                self._num_outstanding = max(0, self._num_outstanding - 1)
                self._forget_failures()
                return lease_from_proto(message)
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the stream and the iteration. Leases already received stay the worker's. Harmless to repeat."""
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
        """Writes grants as they come, until a message has been read."""
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
        """Time left to connect; None once connected, which the first write shows."""
        if self._opened_at is not None:
            return None
        return max(0.0, self._connect_by - asyncio.get_running_loop().time())

    def _take(self) -> Any:
        """What has been read; starts the next read."""
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
        # Where the stream has ended, the read says why.
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
                task.exception()  # Marks it as seen; what matters has been raised already.

    async def _pause(self, error: Exception) -> None:
        """Waits before the next stream, or raises if there was none for too long."""
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
