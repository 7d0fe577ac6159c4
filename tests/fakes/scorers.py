"""Reward and reference servers with answers that the test chooses, behind real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np

from rollmesh.rpc.server import Server
from rollmesh.types import Float32Array, InvalidSample, RetryableFailure, RewardInfo, Score, ScoreOutcome
from rollmesh.v1 import reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from rollmesh.wire.logprobs import LogProbsCall, logprobs_call_from_proto, logprobs_to_proto
from rollmesh.wire.outcome import ScoreCall, outcome_to_proto, reward_info_to_proto, score_call_from_proto

ScoreFunction = Callable[[ScoreCall], Awaitable[ScoreOutcome | None]]
LogProbsFunction = Callable[[LogProbsCall], Awaitable[Float32Array | RetryableFailure | InvalidSample]]


async def score_one(call: ScoreCall) -> ScoreOutcome:
    """Return the score 1 for every sample."""
    return Score(1.0, 1.0)


async def minus_two(call: LogProbsCall) -> Float32Array:
    """Return the log-probability -2 for every token."""
    return np.full(call.num_response_tokens, -2.0, np.float32)


class FakeRewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """A reward server that answers with the result of ``function``, as soon as it returns. None gives no answer."""

    def __init__(self, function: ScoreFunction = score_one, max_in_flight: int = 64) -> None:
        self.function = function
        self.max_in_flight = max_in_flight
        self.calls: list[ScoreCall] = []
        self.requests: list[reward_pb2.ScoreRequest] = []

    async def GetRewardInfo(self, request: Any, context: Any) -> reward_pb2.GetRewardInfoResponse:
        return reward_info_to_proto(RewardInfo("fake", self.max_in_flight))

    async def Score(self, request_iterator: AsyncIterator[reward_pb2.ScoreRequest], context: Any) -> None:
        turn = asyncio.Lock()

        async def answer(request_id: str, call: ScoreCall) -> None:
            outcome = await self.function(call)
            if outcome is not None:
                async with turn:
                    await context.write(outcome_to_proto(request_id, outcome))

        async with asyncio.TaskGroup() as tasks:
            async for request in request_iterator:
                call = score_call_from_proto(request)
                self.requests.append(request)
                self.calls.append(call)
                tasks.create_task(answer(request.request_id, call))


class FakeReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """A reference server that answers with the result of ``function``."""

    def __init__(self, function: LogProbsFunction = minus_two) -> None:
        self.function = function
        self.calls: list[LogProbsCall] = []

    async def ComputeLogProbs(
        self, request_iterator: AsyncIterator[reference_pb2.ComputeLogProbsRequest], context: Any
    ) -> None:
        async for request in request_iterator:
            call = logprobs_call_from_proto(request)
            self.calls.append(call)
            await context.write(logprobs_to_proto(call.request_id, await self.function(call)))


def reward_server(servicer: FakeRewardServicer, address: str = "127.0.0.1:0") -> Server:
    services = {"rollmesh.v1.RewardService": (reward_pb2_grpc.add_RewardServiceServicer_to_server, servicer)}
    return Server(address, services, grace_s=0.0)


def reference_server(servicer: FakeReferenceServicer, address: str = "127.0.0.1:0") -> Server:
    add = reference_pb2_grpc.add_ReferenceServiceServicer_to_server
    return Server(address, {"rollmesh.v1.ReferenceService": (add, servicer)}, grace_s=0.0)
