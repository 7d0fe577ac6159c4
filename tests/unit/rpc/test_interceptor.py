"""Handlers with tasks of their own cannot leave a call without an end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from rollmesh.errors import UnavailableError
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.server import Server
from rollmesh.rpc.status_codes import translate_errors
from rollmesh.v1 import coordinator_pb2, coordinator_pb2_grpc

LARGE = "x" * (2 * 1024 * 1024)


class Handling(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def __init__(self, handle: Callable[[Any], Awaitable[None]]) -> None:
        self.handle = handle

    async def Lease(self, requests: Any, context: Any) -> None:
        await self.handle(context)


def collect(handle: Callable[[Any], Awaitable[None]], delay_s: float = 0.0) -> list[str]:
    """The group ids that a client gets, which begins to read after ``delay_s``. Raises the stream's error."""

    async def main() -> list[str]:
        add = coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server
        services = {"rollmesh.v1.CoordinatorService": (add, Handling(handle))}
        async with Server("127.0.0.1:0", services, grace_s=0.1) as server, open_channel(server.address) as channel:
            stream = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Lease(timeout=20)  # type: ignore[no-untyped-call]
            await asyncio.sleep(delay_s)
            ids = []
            with translate_errors("coordinator"):
                while (lease := await stream.read()) is not grpc.aio.EOF:
                    ids.append(lease.group_id)
            return ids

    return asyncio.run(main())


def test_tasks_of_one_handler_may_write_at_the_same_time() -> None:
    async def handle(context: Any) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(context.write(coordinator_pb2.LeaseResponse(group_id=str(number))))

    assert collect(handle) == [str(number) for number in range(100)]


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_an_error_beside_a_write_under_way_still_ends_the_call(delay_s: float) -> None:
    async def handle(context: Any) -> None:
        writes = [
            asyncio.create_task(context.write(coordinator_pb2.LeaseResponse(prompt_json=LARGE))) for _ in range(8)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for write in writes:
            write.cancel()
        raise UnavailableError("restarting")

    with pytest.raises(UnavailableError, match="restarting"):
        collect(handle, delay_s)


def test_a_return_beside_a_write_under_way_still_ends_the_call() -> None:
    async def handle(context: Any) -> None:
        write = asyncio.create_task(context.write(coordinator_pb2.LeaseResponse(group_id="last", prompt_json=LARGE)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        write.cancel()

    assert collect(handle) == ["last"]


def test_a_client_that_went_away_in_the_middle_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    has_ended = asyncio.Event()
    unseen: list[Any] = []

    async def handle(context: Any) -> None:
        writes = [
            asyncio.create_task(context.write(coordinator_pb2.LeaseResponse(prompt_json=LARGE))) for _ in range(16)
        ]
        try:
            await asyncio.wait(writes)
        finally:
            for write in writes:
                write.cancel()
            has_ended.set()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        add = coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server
        services = {"rollmesh.v1.CoordinatorService": (add, Handling(handle))}
        async with Server("127.0.0.1:0", services, grace_s=0.1) as server, open_channel(server.address) as channel:
            stream = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Lease(timeout=20)  # type: ignore[no-untyped-call]
            await stream.read()
            stream.cancel()
            await asyncio.wait_for(has_ended.wait(), 10)
        gc.collect()  # Errors that nobody saw are reported when their tasks go.

    asyncio.run(main())
    assert unseen == []
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rollmesh")] == []
