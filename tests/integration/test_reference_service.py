"""The reference service, over real gRPC and with a real model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rollmesh.aio.supervisor import Supervisor
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.server import Server
from rollmesh.types import Float32Array, InvalidSample
from rollmesh.v1 import reference_pb2, reference_pb2_grpc
from rollmesh.wire.logprobs import LogProbsCall, logprobs_call_to_proto, logprobs_from_proto
from services.reference.model import FrozenPolicy
from services.reference.scheduler import Scheduler
from services.reference.servicer import ReferenceServicer

VOCAB_SIZE = 64
MAX_TOKENS = 96


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


Stub = reference_pb2_grpc.ReferenceServiceStub


def with_service(model_path: Path, body: Callable[[str], Awaitable[None]], tokens_per_batch: int = 400) -> None:
    async def run() -> None:
        policy = FrozenPolicy.load(model_path, dtype="float32", device="cpu", place="model.path")
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            scheduler = Scheduler(policy.compute_logprobs, executor, tokens_per_batch, 2 * tokens_per_batch)
            servicer = ReferenceServicer(scheduler, policy.vocab_size, policy.max_length or tokens_per_batch)
            service = (reference_pb2_grpc.add_ReferenceServiceServicer_to_server, servicer)
            async with asyncio.timeout(60), Supervisor() as supervisor:
                supervisor.spawn(scheduler.run(), "scheduler")
                async with Server("127.0.0.1:0", {"rollmesh.v1.ReferenceService": service}, grace_s=0.2) as server:
                    await body(server.address)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Stub]:
    async with open_channel(address) as channel:
        yield Stub(channel)  # type: ignore[no-untyped-call]


def random_calls(count: int, seed: int) -> list[LogProbsCall]:
    random = np.random.default_rng(seed)
    calls = []
    for number in range(count):
        length = int(random.integers(2, MAX_TOKENS + 1))
        token_ids = random.integers(0, VOCAB_SIZE, length).astype(np.int32)
        temperature = float(random.choice([0.7, 1.0]))
        calls.append(LogProbsCall(f"{seed}/{number}", token_ids, int(random.integers(1, length)), temperature))
    return calls


async def ask(stub: Stub, calls: list[LogProbsCall]) -> dict[str, Float32Array]:
    """Send all calls on one stream, close this end, and return the answers until the server ends the stream."""

    async def requests() -> AsyncIterator[reference_pb2.ComputeLogProbsRequest]:
        for call in calls:
            yield logprobs_call_to_proto(call)

    num_tokens = {call.request_id: call.num_response_tokens for call in calls}
    answers: dict[str, Float32Array] = {}
    async for answer in stub.ComputeLogProbs(requests()):
        assert answer.request_id not in answers
        outcome = logprobs_from_proto(answer, num_tokens[answer.request_id])
        assert isinstance(outcome, np.ndarray), outcome
        answers[answer.request_id] = outcome
    return answers


def test_concurrent_streams_get_what_one_forward_pass_per_sequence_gives(model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    async def body(address: str) -> None:
        per_stream = [random_calls(60, seed) for seed in range(3)]
        async with connected(address) as one, connected(address) as other:
            answers = await asyncio.gather(ask(one, per_stream[0]), ask(one, per_stream[1]), ask(other, per_stream[2]))
        for calls, answered in zip(per_stream, answers, strict=True):
            assert set(answered) == {call.request_id for call in calls}
            for call in calls:
                tokens = torch.from_numpy(call.token_ids.astype(np.int64))
                with torch.no_grad():
                    logits = model(tokens[None]).logits[0, call.num_prompt_tokens - 1 : -1].double()
                targets = tokens[call.num_prompt_tokens :, None]
                expected = torch.log_softmax(logits / call.temperature, -1).gather(1, targets)[:, 0]
                np.testing.assert_allclose(answered[call.request_id], expected.numpy(), atol=1e-5)

    with_service(model_path, body)


def test_what_cannot_be_computed_is_an_invalid_sample_and_the_stream_goes_on(model_path: Path) -> None:
    good = np.arange(6, dtype="<i4").tobytes()
    faulty: dict[str, tuple[dict[str, Any], str]] = {
        "odd": ({"token_ids": good[:-1]}, "not a multiple of 4"),
        "empty": ({"token_ids": b""}, "num_prompt_tokens is 2"),
        "no prompt": ({"num_prompt_tokens": 0}, "num_prompt_tokens is 0"),
        "no response": ({"num_prompt_tokens": 6}, "num_prompt_tokens is 6"),
        "negative": ({"token_ids": np.array([1, 2, -3], "<i4").tobytes()}, "token id -3"),
        "unknown": ({"token_ids": np.array([1, 2, VOCAB_SIZE], "<i4").tobytes()}, f"holds {VOCAB_SIZE}, but"),
        "long": ({"token_ids": bytes(4 * (MAX_TOKENS + 1))}, f"more than the reference's {MAX_TOKENS}"),
        "greedy": ({"temperature": 0.0}, "temperature is 0"),
        "cold": ({"temperature": -1.0}, "temperature is -1"),
        "nan": ({"temperature": float("nan")}, "temperature is nan"),
        "hot": ({"temperature": float("inf")}, "temperature is inf"),
    }

    async def requests() -> AsyncIterator[reference_pb2.ComputeLogProbsRequest]:
        fields: dict[str, Any] = {"token_ids": good, "num_prompt_tokens": 2, "temperature": 1.0}
        for request_id, (changes, _) in faulty.items():
            yield reference_pb2.ComputeLogProbsRequest(request_id=request_id, **(fields | changes))
        yield reference_pb2.ComputeLogProbsRequest(request_id="good", **fields)

    async def body(address: str) -> None:
        async with connected(address) as stub:
            answers = {answer.request_id: answer async for answer in stub.ComputeLogProbs(requests())}
        assert set(answers) == {*faulty, "good"}
        for request_id, (_, words) in faulty.items():
            outcome = logprobs_from_proto(answers[request_id], 0)
            assert isinstance(outcome, InvalidSample), request_id
            assert words in outcome.reason
        assert isinstance(logprobs_from_proto(answers["good"], 4), np.ndarray)

    with_service(model_path, body)


def test_a_stream_that_breaks_does_not_disturb_the_others(model_path: Path) -> None:
    async def body(address: str) -> None:
        async with connected(address) as doomed, connected(address) as healthy:
            broken = asyncio.ensure_future(ask(doomed, random_calls(200, seed=8)))
            calls = random_calls(50, seed=9)
            answers = asyncio.ensure_future(ask(healthy, calls))
            await asyncio.sleep(0.02)
            broken.cancel()
            assert len(await answers) == 50
            await asyncio.gather(broken, return_exceptions=True)

    with_service(model_path, body)
