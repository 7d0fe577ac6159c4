"""The reward service over real gRPC, with real children."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.scorer_clients import RewardClient
from rollmesh.rpc.server import Server
from rollmesh.types import (
    InvalidSample,
    PolicyVersion,
    PromptId,
    RetryableFailure,
    Sample,
    Score,
    StopReason,
    Turn,
    VersionSpan,
)
from rollmesh.v1 import reward_pb2, reward_pb2_grpc
from rollmesh.wire.outcome import ScoreCall
from services.reward.servicer import MAX_IN_FLIGHT, RewardServicer
from tests.unit.reward.conftest import WriteFunction, running_pool

EXAMPLE = Path(__file__).parents[3] / "examples" / "operators" / "reward_func.py"

ECHO = """
    import time

    def reward_func(queries, prompts, labels):
        if queries[0].endswith("slow"):
            time.sleep(1.0)
        return {
            "rewards": [float(len(query)) for query in queries],
            "scores": [float(len(prompt)) for prompt in prompts],
            "extra_logs": {"label": labels},
        }
"""


def score_call(text: str, prompt: str = "p", label_json: str = "") -> ScoreCall:
    sample = Sample(
        sample_id=f"train:0:3/{text}",
        index=0,
        prompt_id=PromptId("train", 0, 3),
        prompt_token_ids=np.array([1], np.int32),
        response_token_ids=np.array([2], np.int32),
        turns=(Turn(1, 0, StopReason.STOP),),
        behaviour_logprobs=np.zeros(1, np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, 0), 0, 1),),
    )
    return ScoreCall(sample, prompt, text, label_json, "default")


@contextlib.asynccontextmanager
async def serving(path: Path, **settings: Any) -> AsyncIterator[str]:
    async with running_pool(path, **settings) as pool:
        service = (reward_pb2_grpc.add_RewardServiceServicer_to_server, RewardServicer(pool))
        async with Server("127.0.0.1:0", {"rollmesh.v1.RewardService": service}, grace_s=0.2) as server:
            yield server.address


def with_client(path: Path, body: Callable[[RewardClient, str], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), serving(path, **settings) as address:
            client = RewardClient(address)
            info = await client.connect(10.0)
            assert (info.name, info.max_in_flight) == (path.name, MAX_IN_FLIGHT)
            try:
                await body(client, address)
            finally:
                await client.close()

    asyncio.run(run())


def test_texts_and_labels_arrive_and_rewards_scores_and_logs_come_back(write_function: WriteFunction) -> None:
    async def body(client: RewardClient, _: str) -> None:
        assert await client.score(score_call("four", "pp", "2.5"), 10.0) == Score(4.0, 2.0, {"label": 2.5})
        assert await client.score(score_call("✓ü<eos>", "pp", '"x"'), 10.0) == Score(7.0, 2.0, {})

    with_client(write_function(ECHO), body)


def test_hundreds_of_samples_of_several_streams_each_get_their_own_score(write_function: WriteFunction) -> None:
    async def body(first: RewardClient, address: str) -> None:
        clients = [first, RewardClient(address), RewardClient(address)]
        for client in clients[1:]:
            await client.connect(10.0)
        texts = [f"{'x' * (number % 41)}{number}" for number in range(600)]
        outcomes = await asyncio.gather(
            *(clients[number % 3].score(score_call(text), 30.0) for number, text in enumerate(texts))
        )
        assert outcomes == [Score(float(len(text)), 1.0, {}) for text in texts]
        for client in clients[1:]:
            await client.close()

    with_client(write_function(ECHO), body, num_processes=2, samples_per_call=4)


def test_a_label_that_is_not_json_makes_the_sample_invalid_and_nothing_else(write_function: WriteFunction) -> None:
    async def body(client: RewardClient, _: str) -> None:
        for label_json in ("{", "[" * 100_000):
            outcome = await client.score(score_call("q", label_json=label_json), 10.0)
            assert isinstance(outcome, InvalidSample)
            assert outcome.reason.startswith("label_json is not JSON")
        assert isinstance(await client.score(score_call("q"), 10.0), Score)

    with_client(write_function(ECHO), body)


def test_a_fault_of_the_function_travels_as_a_retryable_failure(write_function: WriteFunction) -> None:
    async def body(client: RewardClient, _: str) -> None:
        outcome = await client.score(score_call("q"), 10.0)
        assert outcome == RetryableFailure("reward_func raised ZeroDivisionError: division by zero (graders.py:2)")

    with_client(write_function("def reward_func(q, p, l):\n    return 1 / 0"), body)


def test_a_half_closed_stream_gets_all_its_answers_and_then_ends(write_function: WriteFunction) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), serving(write_function(ECHO)) as address, open_channel(address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]

            async def requests() -> AsyncIterator[reward_pb2.ScoreRequest]:
                for text in ("slow", "a", "bb"):
                    yield reward_pb2.ScoreRequest(request_id=text, query_text=text)

            answers = [(answer.request_id, answer.score.reward) async for answer in stub.Score(requests())]
            assert sorted(answers) == [("a", 1.0), ("bb", 2.0), ("slow", 4.0)]

    asyncio.run(run())


def test_a_stream_that_breaks_takes_its_waiting_samples_with_it(write_function: WriteFunction) -> None:
    async def body(client: RewardClient, address: str) -> None:
        other = RewardClient(address)
        await other.connect(10.0)
        calls = [asyncio.ensure_future(other.score(score_call(f"{number} slow"), 30.0)) for number in range(20)]
        await asyncio.sleep(0.3)
        await other.close(timeout_s=0.0)
        await asyncio.gather(*calls, return_exceptions=True)
        start = time.monotonic()
        assert isinstance(await client.score(score_call("q"), 30.0), Score)
        assert time.monotonic() - start < 15

    with_client(write_function(ECHO), body)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the operators example")
def test_the_example_scores_a_right_and_a_wrong_answer() -> None:
    async def body(client: RewardClient, _: str) -> None:
        prompt = "<bos> 7 ? 7 ? 1 = 15 :"
        right = await client.score(score_call(f"{prompt} 7 + 7 = 14 + 1 = 15 ok <eos>", prompt, "15"), 10.0)
        wrong = await client.score(score_call(f"{prompt} 7 + 7 = 14 - 1 = 13 no <eos>", prompt, "15"), 10.0)
        assert (right, wrong) == (Score(1.0, 1.0, {"tries": 1.0}), Score(0.0, 0.0, {"tries": 1.0}))

    with_client(EXAMPLE, body)
