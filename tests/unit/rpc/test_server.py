"""Binding, health, reflection and the ordered stop."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.server import Server
from rollmesh.v1 import reward_pb2, reward_pb2_grpc

NAME = "rollmesh.v1.RewardService"


class SlowReward(reward_pb2_grpc.RewardServiceServicer):
    """Answers after ``delay_s``."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.has_begun = asyncio.Event()
        self.was_cancelled = False

    async def GetRewardInfo(self, request: Any, context: Any) -> reward_pb2.GetRewardInfoResponse:
        self.has_begun.set()
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return reward_pb2.GetRewardInfoResponse(name="slow")


def make_server(address: str, servicer: SlowReward | None = None, **options: Any) -> Server:
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    return Server(address, {NAME: (add, servicer or SlowReward())}, place="reward.address", **options)


async def check_health(channel: grpc.aio.Channel, service: str) -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return name


def test_port_0_takes_a_free_port_and_says_which() -> None:
    async def main() -> None:
        async with make_server("127.0.0.1:0") as one, make_server("127.0.0.1:0") as other:
            assert one.address.startswith("127.0.0.1:")
            assert one.address != other.address
            assert not one.address.endswith(":0")

    asyncio.run(main())


def test_a_port_in_use_is_refused_naming_the_setting_and_the_fix() -> None:
    async def main() -> None:
        async with make_server("127.0.0.1:0") as first:
            with pytest.raises(ConfigError, match="in use") as caught:
                async with make_server(first.address):
                    pass
        assert caught.value.place == "reward.address"
        assert first.address in str(caught.value)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("192.0.2.1:0", "not an address of this machine"),
        ("no-such-host.invalid:0", "unknown host"),
        ("7000", "not an address"),
    ],
)
def test_an_address_that_cannot_be_bound_says_why(address: str, problem: str) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=problem):
            async with make_server(address):
                pass

    asyncio.run(main())


def test_health_follows_set_serving_for_the_server_and_its_services() -> None:
    async def main() -> None:
        async with make_server("127.0.0.1:0", is_serving=False) as server, open_channel(server.address) as channel:
            assert await check_health(channel, NAME) == "NOT_SERVING"
            assert await check_health(channel, "") == "NOT_SERVING"
            await server.set_serving(True)
            assert await check_health(channel, NAME) == "SERVING"
            assert await check_health(channel, "") == "SERVING"

    asyncio.run(main())


def test_reflection_lists_the_services() -> None:
    async def main() -> list[str]:
        async with make_server("127.0.0.1:0") as server, open_channel(server.address) as channel:
            stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=10)
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await stream.read()
            await stream.done_writing()
            return [service.name for service in answer.list_services_response.service]

    assert {NAME, "grpc.health.v1.Health"} <= set(asyncio.run(main()))


def test_a_running_call_is_answered_while_the_server_stops() -> None:
    async def main() -> str:
        servicer = SlowReward(delay_s=0.3)
        async with make_server("127.0.0.1:0", servicer) as server:
            channel = open_channel(server.address)
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            answer = asyncio.ensure_future(stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=10))
            await servicer.has_begun.wait()
        name: str = (await answer).name
        await channel.close()
        return name

    assert asyncio.run(main()) == "slow"


def test_a_call_that_never_ends_is_cancelled_after_the_grace() -> None:
    async def main() -> float:
        servicer = SlowReward(delay_s=60)
        async with make_server("127.0.0.1:0", servicer, grace_s=0.3) as server:
            channel = open_channel(server.address)
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            answer = asyncio.ensure_future(stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=30))
            await servicer.has_begun.wait()
            begin = time.monotonic()
        duration_s = time.monotonic() - begin
        with pytest.raises(grpc.aio.AioRpcError):
            await answer
        await channel.close()
        assert servicer.was_cancelled
        return duration_s

    assert 0.2 < asyncio.run(main()) < 20


def test_a_watcher_of_health_hears_of_the_stop_before_it_happens() -> None:
    async def main() -> list[int]:
        async with make_server("127.0.0.1:0", grace_s=0.3) as server:
            channel = open_channel(server.address)
            stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
            heard = [(await stream.read()).status]
        heard.append((await stream.read()).status)
        await channel.close()
        return heard

    status = health_pb2.HealthCheckResponse
    assert asyncio.run(main()) == [status.SERVING, status.NOT_SERVING]


def test_the_port_is_free_again_after_the_stop() -> None:
    async def main() -> None:
        async with make_server("127.0.0.1:0") as first:
            address = first.address
        async with make_server(address) as second:
            assert second.address == address

    asyncio.run(main())


def test_stopping_twice_is_harmless() -> None:
    async def main() -> None:
        async with make_server("127.0.0.1:0") as server:
            await server.stop()
            await server.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("address", "is_warned"), [("0.0.0.0:0", True), ("127.0.0.1:0", False)])
def test_an_address_open_to_other_machines_is_warned_about(
    address: str, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with make_server(address):
            pass

    with caplog.at_level(logging.WARNING, logger="rollmesh"):
        asyncio.run(main())
    assert any("other machines" in record.message for record in caplog.records) is is_warned
