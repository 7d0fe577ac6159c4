"""The server's half of a stream on which each request is answered once, in any order: the counterpart of
`rollmesh.rpc.multiplex.StreamCaller`.

::

    peer ──► reader: waits for room, submits ──► the servicer's futures ──► done queue ──► writer ──► peer

* The reader waits for room among ``max_in_flight`` and for ``submit``; while it does, the peer's flow control fills up.
  An answer that was written makes room, so a peer that reads no answers is read no further either.
* The writer waits for futures. That they end is up to the servicer, whose work has time limits.
* When the peer half-closes, what is in flight is answered and the stream ends. When the stream breaks or the servicer
  fails, the futures are cancelled: the peer will ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

RequestT = TypeVar("RequestT")
OutcomeT = TypeVar("OutcomeT")
ResponseT_contra = TypeVar("ResponseT_contra", contravariant=True)


class ResponseWriter(Protocol[ResponseT_contra]):
    """The part of a `grpc.aio.ServicerContext` that is needed."""

    async def write(self, message: ResponseT_contra, /) -> None: ...


async def answer_stream(
    requests: AsyncIterator[RequestT],
    context: ResponseWriter[ResponseT_contra],
    submit: Callable[[RequestT], Awaitable[asyncio.Future[OutcomeT]]],
    respond: Callable[[RequestT, OutcomeT], ResponseT_contra],
    *,
    max_in_flight: int,
) -> None:
    """Serve one stream to its end.

    Args:
        requests: the stream's request iterator.
        context: where the answers go.
        submit: takes a request and returns the future of its outcome; may wait, which holds back the peer.
        respond: makes the answer of a request and its outcome.
        max_in_flight: requests that may be unanswered at the same time.

    Raises:
        Exception: what ``submit``, ``respond`` or a future raised; nothing more is answered then.
    """
    room = asyncio.Semaphore(max_in_flight)
    in_flight: set[asyncio.Future[OutcomeT]] = set()
    done: asyncio.Queue[tuple[RequestT, asyncio.Future[OutcomeT]] | None] = asyncio.Queue()

    async def read() -> None:
        async for request in requests:
            await room.acquire()
            future = await submit(request)
            in_flight.add(future)
            future.add_done_callback(lambda ended, request=request: done.put_nowait((request, ended)))  # type: ignore[misc]

    reader: asyncio.Task[Any] = asyncio.create_task(read(), name="request reader")
    reader.add_done_callback(lambda _: done.put_nowait(None))
    try:
        while in_flight or not reader.done():
            item = await done.get()
            if item is None:
                reader.result()
                continue
            request, future = item
            in_flight.discard(future)
            await context.write(respond(request, future.result()))
            room.release()
    finally:
        reader.cancel()
        for future in in_flight:
            future.cancel()
        await asyncio.gather(reader, return_exceptions=True)
