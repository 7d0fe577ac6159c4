"""The server's side of `rollmesh.rpc.status_codes`: a servicer raises an error of the mesh, the interceptor sends it.

The interceptor also puts the messages of a handler in order. gRPC takes one message at a time: a second
``context.write`` during the first fails. Sending the status during a cancelled write fails too; the call then never
ends, and its client waits for ever. A handler with tasks of its own easily does both. So the interceptor queues and
finishes the writes, and sends the status after the last write.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from rollmesh.errors import RollMeshError
from rollmesh.rpc.status_codes import DETAIL_KEY, status_of

_logger = logging.getLogger(__name__)

_LAST_WRITE_TIMEOUT_S = 10.0
"""Time for which the status waits for messages that a stalled client does not take."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Maps the errors of asynchronous handlers of all four kinds to statuses.

    The interceptor leaves a handler alone that chooses a status itself (``context.abort``), and every synchronous
    handler: synchronous handlers are the generated stubs of methods that nobody implemented.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        flags = (handler.request_streaming, handler.response_streaming)
        style = "_".join("stream" if is_stream else "unary" for is_stream in flags)
        wrapped = _wrap(getattr(handler, style), handler_call_details.method)
        make = getattr(grpc, f"{style}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


class _OrderedContext:
    """A servicer context that writes one message after the other. A write ends even if its writer is cancelled.

    Everything except `write` is passed to the wrapped context.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._turn = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        write = asyncio.create_task(self._write_in_turn(message), name="write to client")
        self._writes.add(write)
        write.add_done_callback(self._forget)
        await asyncio.shield(write)

    async def _write_in_turn(self, message: Any) -> None:
        async with self._turn:
            await self._context.write(message)

    def _forget(self, write: asyncio.Task[None]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # Marks the error as seen: the writer has seen it, or the call is over.

    async def settle(self) -> None:
        """Wait for the messages whose writers were cancelled, 10 s at most."""
        if self._writes:
            await asyncio.wait(self._writes, timeout=_LAST_WRITE_TIMEOUT_S)
        for write in self._writes:
            write.cancel()


def _wrap(behaviour: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Any]:
    """Return ``behaviour`` with mapped errors. The kind of function stays, because grpc.aio runs each kind
    differently."""
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async with contextlib.aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the place that maps what servicers raise
                await _abort(context, error, method)

        return generate
    if inspect.iscoroutinefunction(behaviour):

        async def respond(request: Any, context: Any) -> Any:
            ordered = _OrderedContext(context)
            try:
                response = await behaviour(request, ordered)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the place that maps what servicers raise
                await ordered.settle()
                await _abort(context, error, method)
            await ordered.settle()
            return response

        return respond
    return behaviour


async def _abort(context: Any, error: Exception, method: str) -> NoReturn:
    if isinstance(error, RollMeshError):
        code, detail = status_of(error)
    else:
        _logger.error("%s failed", method, exc_info=error)
        code, detail = status_of(RollMeshError(f"internal error in {method}; the server's log has the details"))
    await context.abort(code, detail.message, ((DETAIL_KEY, detail.SerializeToString()),))
    raise AssertionError("context.abort returned")
