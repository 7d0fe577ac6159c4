"""Answers each request of a stream once, in any order: the server's side of `rollmesh.rpc.multiplex.StreamCaller`.

::

    peer ──► reader: waits for room, submits ──► the servicer's futures ──► done queue ──► writer ──► peer

* The reader waits until fewer than ``max_in_flight`` requests are in flight, and waits for ``submit``. Meanwhile the
  peer's
  flow control fills up. A written answer makes room, so the reader reads no further from a peer that reads no answers.
* The writer waits for futures. The servicer's work has time limits, so every future ends.
* When the peer half-closes the stream, the writer answers the requests in flight, and the stream ends. When the stream
  breaks or the servicer fails, the futures are cancelled: the peer will ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

RequestT = TypeVar("RequestT")
OutcomeT = TypeVar("OutcomeT")
ResponseT_contra = TypeVar("ResponseT_contra", contravariant=True)


class ResponseWriter(Protocol[ResponseT_contra]):
    """The method of a `grpc.aio.ServicerContext` that this module calls; grpc gives the class no types."""

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
        context: takes the answers.
        submit: takes a request and returns the future of the outcome. ``submit`` may wait, which holds back the peer.
        respond: makes the answer out of a request and its outcome.
        max_in_flight: the most requests that may be unanswered at the same time.

    Raises:
        Exception: the error of ``submit``, ``respond`` or a future. The stream then gets no more answers.
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
