"""`RewardService` in front of the pool. The function reads texts only, so the servicer does not decode token ids."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from rollmesh.rpc.responder import answer_stream
from rollmesh.types import InvalidSample, RewardInfo, ScoreOutcome
from rollmesh.v1 import reward_pb2, reward_pb2_grpc
from rollmesh.wire.outcome import outcome_to_proto, reward_info_to_proto
from services.reward.pool import RewardPool
from services.reward.process import RewardJob

MAX_IN_FLIGHT = 256
_SHARE_OF_DEADLINE = 0.9
"""The share of the caller's time that scoring may take. The rest lets the caller hear why a score is missing."""


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Answers each sample once. The proto states what the peers may rely on."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool

    async def GetRewardInfo(
        self, request: reward_pb2.GetRewardInfoRequest, context: Any
    ) -> reward_pb2.GetRewardInfoResponse:
        return reward_info_to_proto(RewardInfo(self._pool.name, MAX_IN_FLIGHT))

    async def Score(self, request_iterator: AsyncIterator[reward_pb2.ScoreRequest], context: Any) -> None:
        await answer_stream(request_iterator, context, self._submit, _respond, max_in_flight=MAX_IN_FLIGHT)

    async def _submit(self, request: reward_pb2.ScoreRequest) -> asyncio.Future[ScoreOutcome]:
        if request.label_json:
            try:
                json.loads(request.label_json)
            except (ValueError, RecursionError) as error:
                refused: asyncio.Future[ScoreOutcome] = asyncio.get_running_loop().create_future()
                refused.set_result(InvalidSample(f"label_json is not JSON: {error}"))
                return refused
        job = RewardJob(request.sample.sample_id, request.query_text, request.prompt_text, request.label_json)
        return self._pool.submit(job, _SHARE_OF_DEADLINE * request.deadline_ms / 1000 or None)


def _respond(request: reward_pb2.ScoreRequest, outcome: ScoreOutcome) -> reward_pb2.ScoreResponse:
    return outcome_to_proto(request.request_id, outcome)
