"""Addresses and channels."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import Address, open_channel, parse_address
from rollmesh.rpc.server import Server
from rollmesh.v1 import reward_pb2, reward_pb2_grpc

LARGE = 5 * 1024 * 1024  # Above gRPC's own limit of 4 MiB.


class LargeReward(reward_pb2_grpc.RewardServiceServicer):
    async def GetRewardInfo(self, request: Any, context: Any) -> reward_pb2.GetRewardInfoResponse:
        return reward_pb2.GetRewardInfoResponse(name="x" * LARGE)

    async def Score(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            yield reward_pb2.ScoreResponse(request_id=str(len(request.query_text)))


def serve_large() -> Server:
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    return Server("127.0.0.1:0", {"rollmesh.v1.RewardService": (add, LargeReward())}, place="reward.address")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051),
        ("localhost:0", "localhost", 0),
        ("reward-7.cluster.local:65535", "reward-7.cluster.local", 65535),
        ("[::1]:80", "::1", 80),
    ],
)
def test_an_address_is_parsed_and_written_back_as_it_was(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        ":50051",
        "localhost:",
        "localhost:http",
        "host:70000",
        "::1:80",
        "[zz]:1",
        "http://a:1",
        "a b:1",
    ],
)
def test_anything_but_host_and_port_is_refused_naming_the_place(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.address: ") as caught:
        parse_address(text, "reward.address")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost", True),
        ("127.0.0.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("node7", False),
    ],
)
def test_loopback_is_recognised(host: str, is_loopback: bool) -> None:
    assert Address(host, 1).is_loopback is is_loopback


def test_a_channel_to_port_0_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="port 0"):
            open_channel("127.0.0.1:0")

    asyncio.run(main())


def test_messages_above_the_default_limit_pass_in_both_directions() -> None:
    async def main() -> None:
        async with serve_large() as server, open_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            info = await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=20)
            assert len(info.name) == LARGE
            stream = stub.Score(timeout=20)
            await stream.write(reward_pb2.ScoreRequest(query_text="y" * LARGE))
            assert (await stream.read()).request_id == str(LARGE)
            await stream.done_writing()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"], ids=["loopback", "another-host"])
def test_a_proxy_of_the_environment_is_never_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # Nobody listens there.

    async def main() -> None:
        async with serve_large() as server, open_channel(f"{host}:{parse_address(server.address).port}") as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=20)

    asyncio.run(main())


def test_a_server_that_is_slow_to_accept_a_connection_is_waited_for() -> None:
    async def main() -> None:
        async with serve_large() as server, await slow_way_to(server.address) as way:
            host, port = way.sockets[0].getsockname()
            async with open_channel(f"{host}:{port}") as channel:
                stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
                await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=20)

    asyncio.run(main())


async def slow_way_to(address: str) -> asyncio.Server:
    """Passes connections on to ``address``, half a second after they came."""
    host, port = address.split(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer), return_exceptions=True)

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def test_a_target_that_grpc_resolves_itself_is_passed_on() -> None:
    async def main() -> None:
        async with serve_large() as server, open_channel(f"dns:///{server.address}") as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=20)

    asyncio.run(main())


def test_there_is_one_place_that_opens_channels() -> None:
    root = Path(__file__).resolve().parents[3]
    sources = [path for name in ("rollmesh", "services") for path in (root / name).rglob("*.py")]
    openers = [path.name for path in sources if re.search(r"secure_channel\(", path.read_text(encoding="utf-8"))]
    assert openers == ["channel.py"]
