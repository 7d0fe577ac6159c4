"""Errors of the mesh survive the wire; everything else is kept from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from rollmesh.errors import (
    ConfigError,
    DeadlineError,
    InvalidArgumentError,
    ReplayError,
    RollMeshError,
    RunEndedError,
    SupersededError,
    TaintedError,
    UnavailableError,
    UnknownMemberError,
    WeightTransferError,
)
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.server import Server
from rollmesh.rpc.status_codes import DETAIL_KEY, error_from_rpc, translate_errors
from rollmesh.v1 import coordinator_pb2, coordinator_pb2_grpc, error_pb2, reward_pb2, reward_pb2_grpc

Raise = Callable[[Any], Awaitable[None]]


class Failing(reward_pb2_grpc.RewardServiceServicer, coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Fails every call as told: unary, in an asynchronous generator, and in a coroutine that writes."""

    def __init__(self, fail: Raise) -> None:
        self.fail = fail

    async def GetRewardInfo(self, request: Any, context: Any) -> Any:
        await self.fail(context)

    async def Score(self, requests: Any, context: Any) -> Any:
        yield reward_pb2.ScoreResponse(request_id="before")
        await self.fail(context)

    async def Lease(self, requests: Any, context: Any) -> None:
        await context.write(coordinator_pb2.LeaseResponse(group_id="before"))
        await self.fail(context)


async def call_unary(channel: grpc.aio.Channel) -> None:
    await reward_pb2_grpc.RewardServiceStub(channel).GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=10)  # type: ignore[no-untyped-call]


async def read_generator(channel: grpc.aio.Channel) -> None:
    stream = reward_pb2_grpc.RewardServiceStub(channel).Score(timeout=10)  # type: ignore[no-untyped-call]
    assert (await stream.read()).request_id == "before"
    await stream.read()


async def read_writer(channel: grpc.aio.Channel) -> None:
    stream = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Lease(timeout=10)  # type: ignore[no-untyped-call]
    assert (await stream.read()).group_id == "before"
    await stream.read()


CALLS = [call_unary, read_generator, read_writer]
Call = Callable[[grpc.aio.Channel], Awaitable[None]]


def provoke(fail: Raise, call: Call) -> RollMeshError:
    """The error that the caller sees when the servicer fails."""

    async def main() -> RollMeshError:
        servicer = Failing(fail)
        services = {
            "rollmesh.v1.RewardService": (reward_pb2_grpc.add_RewardServiceServicer_to_server, servicer),
            "rollmesh.v1.CoordinatorService": (
                coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server,
                servicer,
            ),
        }
        async with Server("127.0.0.1:0", services) as server, open_channel(server.address) as channel:
            with pytest.raises(RollMeshError) as caught, translate_errors("peer-7"):
                await call(channel)
            return caught.value

    return asyncio.run(main())


def raising(error: Exception) -> Raise:
    async def fail(context: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("must be above 0", field="sample.turns"),
        UnknownMemberError("rollout-0 is not known"),
        SupersededError("epoch 3 is over"),
        UnavailableError("busy", retry_after_s=1.25),
        DeadlineError("prepare took too long"),
        WeightTransferError("digests differ"),
        TaintedError("out of memory in layer 3"),
        RunEndedError("the run is over"),
        RollMeshError("something else"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_the_type_it_was_raised_as(error: RollMeshError, call: Call) -> None:
    seen = provoke(raising(error), call)
    assert type(seen) is type(error)
    assert str(seen) == str(error)
    assert vars(seen) == vars(error)


def test_errors_that_mean_something_only_inside_a_service_arrive_as_the_nearest_type() -> None:
    seen = provoke(raising(ConfigError("run.name", "'b' is not the run here", "use 'a'")), call_unary)
    assert isinstance(seen, InvalidArgumentError)
    assert (seen.field, str(seen)) == ("run.name", "run.name: 'b' is not the run here; use 'a'")
    assert type(provoke(raising(ReplayError("row is gone")), call_unary)) is RollMeshError


@pytest.mark.parametrize("call", CALLS)
def test_an_unexpected_exception_is_logged_once_and_keeps_its_text_from_the_caller(
    call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        seen = provoke(raising(KeyError("secret-path")), call)
    assert type(seen) is RollMeshError
    assert "internal error in /rollmesh.v1." in str(seen)
    assert "secret-path" not in str(seen)
    failures = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(failures) == 1
    assert failures[0].exc_info is not None
    assert "secret-path" in str(failures[0].exc_info[1])


def test_an_expected_error_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        provoke(raising(UnavailableError("busy")), call_unary)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("call", CALLS)
def test_a_status_that_the_servicer_chose_itself_is_left_alone(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "come back later")

    with caplog.at_level(logging.INFO, logger="rollmesh"):
        seen = provoke(fail, call)
    assert isinstance(seen, UnavailableError)
    assert "peer-7: come back later" in str(seen)
    assert caplog.records == []


def test_a_message_of_any_length_fits_into_the_status() -> None:
    seen = provoke(raising(InvalidArgumentError("ü€" * 20_000, field="f" * 20_000)), call_unary)
    assert isinstance(seen, InvalidArgumentError)
    assert str(seen).startswith("ü€ü€")
    assert str(seen).endswith("…")
    assert len(seen.field) <= 1024


def test_a_method_that_nobody_implemented_is_an_error_naming_the_peer() -> None:
    async def main() -> str:
        add = reward_pb2_grpc.add_RewardServiceServicer_to_server
        services = {"rollmesh.v1.RewardService": (add, Failing(raising(RollMeshError("unused"))))}
        async with Server("127.0.0.1:0", services) as server, open_channel(server.address) as channel:
            with pytest.raises(RollMeshError) as caught, translate_errors("peer-7"):
                await read_writer(channel)
            assert type(caught.value) is RollMeshError
            return str(caught.value)

    message = asyncio.run(main())
    assert message.startswith("peer-7: ")
    assert "UNIMPLEMENTED" in message


def test_cancelling_a_call_cancels_its_handler_and_is_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    has_begun, was_cancelled = asyncio.Event(), asyncio.Event()

    async def fail(context: Any) -> None:
        has_begun.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    async def main() -> None:
        add = reward_pb2_grpc.add_RewardServiceServicer_to_server
        async with (
            Server("127.0.0.1:0", {"rollmesh.v1.RewardService": (add, Failing(fail))}) as server,
            open_channel(server.address) as channel,
        ):
            task = asyncio.create_task(call_unary(channel))
            await asyncio.wait_for(has_begun.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError), translate_errors():
                await task
            await asyncio.wait_for(was_cancelled.wait(), 10)

    with caplog.at_level(logging.WARNING, logger="rollmesh"):
        asyncio.run(main())
    assert caplog.records == []


def test_nobody_listening_is_unavailable() -> None:
    async def main() -> None:
        async with open_channel("127.0.0.1:1") as channel:
            with pytest.raises(UnavailableError, match=r"^peer-7: "), translate_errors("peer-7"):
                await call_unary(channel)

    asyncio.run(main())


def make_status(code: grpc.StatusCode, details: str = "", detail: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata() if detail is None else grpc.aio.Metadata((DETAIL_KEY, detail))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", DeadlineError),
        (grpc.StatusCode.UNAVAILABLE, "", UnavailableError),
        (grpc.StatusCode.CANCELLED, "", UnavailableError),
        (grpc.StatusCode.INTERNAL, "Internal error from Core", UnavailableError),
        (grpc.StatusCode.INVALID_ARGUMENT, "", InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls", UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)", InvalidArgumentError),
        (grpc.StatusCode.PERMISSION_DENIED, "", RollMeshError),
        (grpc.StatusCode.DATA_LOSS, "", RollMeshError),
        (grpc.StatusCode.UNKNOWN, "", RollMeshError),
    ],
)
def test_a_status_of_a_foreign_server_is_judged_by_its_code(
    code: grpc.StatusCode, details: str, kind: type[RollMeshError]
) -> None:
    error = error_from_rpc(make_status(code, details), "reward")
    assert type(error) is kind
    assert code.name in str(error)


def test_a_detail_that_cannot_be_read_falls_back_to_the_code() -> None:
    error = error_from_rpc(make_status(grpc.StatusCode.UNAVAILABLE, "gone", detail=b"\xff\xff\xff"))
    assert isinstance(error, UnavailableError)


@pytest.mark.parametrize(("retryable", "kind"), [(True, UnavailableError), (False, RollMeshError)])
def test_a_reason_of_a_newer_peer_is_judged_by_whether_it_may_be_retried(
    retryable: bool, kind: type[RollMeshError]
) -> None:
    detail = error_pb2.ErrorDetail(message="new", retryable=retryable)
    detail.MergeFromString(b"\x08\x63")  # reason = 99
    error = error_from_rpc(make_status(grpc.StatusCode.ABORTED, detail=detail.SerializeToString()))
    assert type(error) is kind
    assert str(error) == "new"
