"""Samples over the Score stream, and large messages over the same stream, against a raw TCP socket.

::

    this process: RewardClient.score, 256 at a time ──► second process: answers each at once
    this process: messages of 768 KB ───────────────► second process: answers one in eight
    this process: sendall of 768 KB ────────────────► second process: reads into one buffer
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import numpy as np
import uvloop

from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.responder import answer_stream
from rollmesh.rpc.scorer_clients import RewardClient
from rollmesh.rpc.server import Server
from rollmesh.types import PromptId, RewardInfo, Score, ScoreOutcome
from rollmesh.v1 import reward_pb2, reward_pb2_grpc
from rollmesh.wire.outcome import ScoreCall, outcome_to_proto, reward_info_to_proto
from rollmesh.wire.trajectory import sample_from_proto, sample_to_proto
from tests.bench.figures import Figure, median
from tests.bench.payloads import make_sample
from tests.bench.peer import Peer, say

IN_FLIGHT = 256
LARGE_BYTES = 768 * 1024
MESSAGES_PER_ANSWER = 8
LARGE = "large"
"""Datasource of the messages that are answered one in eight."""


def run(quick: bool) -> list[Figure]:
    """Bytes per second, in turns."""
    num_samples, num_large, num_pairs = (500, 64, 3) if quick else (4000, 400, 7)
    with Peer(["-m", "tests.bench.grpc_stream"]) as peer:
        where = peer.answer()
        rates = _run(_measure(where["address"], where["tcp_port"], num_samples, num_large, num_pairs))
    tcp, samples, large = (list(column) for column in zip(*rates, strict=True))
    sample_bytes = _sample_bytes()
    details = {"tcp_bytes_per_s": median(tcp)}
    return [
        Figure(
            "grpc_stream",
            "bytes/s of a gRPC stream in messages of 768 KB / raw TCP on loopback",
            None,
            "at least",
            [ours / theirs for ours, theirs in zip(large, tcp, strict=True)],
            {"grpc_bytes_per_s": median(large), "message_bytes": LARGE_BYTES, **details},
        ),
        Figure(
            "grpc_score_stream",
            "bytes/s of samples of 1,280 tokens scored one by one / raw TCP on loopback",
            None,
            "at least",
            [ours / theirs for ours, theirs in zip(samples, tcp, strict=True)],
            {
                "samples_per_s": median(samples) / sample_bytes,
                "tokens_per_s": median(samples) / sample_bytes * 1280,
                "message_bytes": sample_bytes,
                **details,
            },
        ),
    ]


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _score_call(index: int) -> ScoreCall:
    sample = make_sample(PromptId("train", 0, index), 0, np.random.default_rng(index))
    return ScoreCall(sample, "p" * 1000, "q" * 5000, '"label"', "numbers")


def _sample_bytes() -> int:
    call = _score_call(0)
    message = reward_pb2.ScoreRequest(
        request_id="1234",
        sample=sample_to_proto(call.sample),
        prompt_text=call.prompt_text,
        query_text=call.query_text,
        label_json=call.label_json,
        datasource=call.datasource,
        deadline_ms=60_000,
    )
    return int(message.ByteSize())


async def _measure(
    address: str, tcp_port: int, num_samples: int, num_large: int, num_pairs: int
) -> list[tuple[float, float, float]]:
    """(raw TCP, samples, large messages) in bytes/s for each round; the first round warms up and does not count."""
    client = RewardClient(address)
    await client.connect(30.0)
    channel = open_channel(address)
    stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
    calls = [_score_call(index) for index in range(64)]
    sample_bytes = _sample_bytes()
    rounds = []
    for _ in range(num_pairs + 1):
        tcp = num_large * LARGE_BYTES / await asyncio.to_thread(_send_raw, tcp_port, num_large)
        samples = num_samples * sample_bytes / await _score(client, calls, num_samples)
        large = num_large * LARGE_BYTES / await _send_large(stub, num_large)
        rounds.append((tcp, samples, large))
    await client.close()
    await channel.close()
    return rounds[1:]


async def _score(client: RewardClient, calls: list[ScoreCall], num_samples: int) -> float:
    remaining = iter(range(num_samples))

    async def work() -> None:
        for number in remaining:
            outcome = await client.score(calls[number % len(calls)], 60.0)
            assert isinstance(outcome, Score)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - started


async def _send_large(stub: Any, num_messages: int) -> float:
    message = reward_pb2.ScoreRequest(
        request_id="1", sample={"response_token_ids": bytes(LARGE_BYTES)}, datasource=LARGE, deadline_ms=60_000
    )
    started = time.perf_counter()
    stream = stub.Score(timeout=60.0)

    async def write() -> None:
        for _ in range(num_messages):
            await stream.write(message)
        await stream.done_writing()

    writer = asyncio.create_task(write())
    num_answers = 0
    async for _ in stream:
        num_answers += 1
    await writer
    assert num_answers == num_messages // MESSAGES_PER_ANSWER, num_answers
    return time.perf_counter() - started


def _send_raw(port: int, num_messages: int) -> float:
    payload = bytes(LARGE_BYTES)
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=60.0) as connection:
        for _ in range(num_messages):
            connection.sendall(payload)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"."
    return time.perf_counter() - started


class _Servicer(reward_pb2_grpc.RewardServiceServicer):
    """Reads and checks every sample as a real server would, and rewards it without a look."""

    async def GetRewardInfo(self, request: Any, context: Any) -> reward_pb2.GetRewardInfoResponse:
        return reward_info_to_proto(RewardInfo("bench", IN_FLIGHT))

    async def Score(self, request_iterator: AsyncIterator[reward_pb2.ScoreRequest], context: Any) -> None:
        first = await anext(request_iterator)
        if first.datasource == LARGE:
            await self._answer_some(first, request_iterator, context)
            return

        async def requests() -> AsyncIterator[reward_pb2.ScoreRequest]:
            yield first
            async for request in request_iterator:
                yield request

        await answer_stream(requests(), context, self._submit, _respond, max_in_flight=IN_FLIGHT)

    async def _answer_some(self, first: Any, rest: AsyncIterator[Any], context: Any) -> None:
        num_read, num_bytes = 1, len(first.sample.response_token_ids)
        async for request in rest:
            num_read += 1
            num_bytes += len(request.sample.response_token_ids)
            if num_read % MESSAGES_PER_ANSWER == 0:
                await context.write(outcome_to_proto("1", Score(1.0, 1.0)))
        assert num_bytes == num_read * LARGE_BYTES

    async def _submit(self, request: reward_pb2.ScoreRequest) -> asyncio.Future[ScoreOutcome]:
        sample_from_proto(request.sample)
        answer: asyncio.Future[ScoreOutcome] = asyncio.get_running_loop().create_future()
        answer.set_result(Score(1.0, 1.0))
        return answer


def _respond(request: reward_pb2.ScoreRequest, outcome: ScoreOutcome) -> reward_pb2.ScoreResponse:
    return outcome_to_proto(request.request_id, outcome)


def _receive_raw(listener: socket.socket) -> None:
    buffer = memoryview(bytearray(1024 * 1024))
    while True:
        connection, _ = listener.accept()
        with connection:
            while connection.recv_into(buffer):
                pass
            connection.sendall(b".")


async def serve() -> None:
    """The second process; ends when its standard input does."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_receive_raw, args=(listener,), daemon=True).start()
    service = (reward_pb2_grpc.add_RewardServiceServicer_to_server, _Servicer())
    async with Server("127.0.0.1:0", {"rollmesh.v1.RewardService": service}, grace_s=0.5) as server:
        say(address=server.address, tcp_port=listener.getsockname()[1])
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    _run(serve())
