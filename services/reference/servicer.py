"""`ReferenceService` in front of the scheduler.

The servicer also answers a request that cannot be computed. An error would end the stream's other requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from rollmesh.errors import InvalidArgumentError
from rollmesh.rpc.responder import answer_stream
from rollmesh.types import InvalidSample
from rollmesh.v1 import reference_pb2, reference_pb2_grpc
from rollmesh.wire.logprobs import logprobs_call_from_proto, logprobs_to_proto
from services.reference.model import LogProbJob
from services.reference.scheduler import Outcome, Scheduler

MAX_IN_FLIGHT = 256


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """Answers each request once.

    Args:
        scheduler: computes the log-probabilities.
        vocab_size: the size of the vocabulary; every token id is smaller.
        max_num_tokens: the most tokens of a sample, prompt and response together.
    """

    def __init__(self, scheduler: Scheduler, vocab_size: int, max_num_tokens: int) -> None:
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._max_num_tokens = max_num_tokens

    async def ComputeLogProbs(
        self, request_iterator: AsyncIterator[reference_pb2.ComputeLogProbsRequest], context: Any
    ) -> None:
        await answer_stream(request_iterator, context, self._submit, _respond, max_in_flight=MAX_IN_FLIGHT)

    async def _submit(self, request: reference_pb2.ComputeLogProbsRequest) -> asyncio.Future[Outcome]:
        job = read_job(request, self._vocab_size, self._max_num_tokens)
        if isinstance(job, LogProbJob):
            return await self._scheduler.submit(job)
        refused: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        refused.set_result(job)
        return refused


def read_job(
    request: reference_pb2.ComputeLogProbsRequest, vocab_size: int, max_num_tokens: int
) -> LogProbJob | InvalidSample:
    """Return the job of a request, or an `InvalidSample` that says what is wrong with the request."""
    try:
        call = logprobs_call_from_proto(request)
    except InvalidArgumentError as error:
        return InvalidSample(str(error))
    token_ids = call.token_ids
    if len(token_ids) > max_num_tokens:
        return InvalidSample(f"token_ids has {len(token_ids)} entries, more than the reference's {max_num_tokens}")
    if (highest := int(token_ids.max())) >= vocab_size:
        return InvalidSample(f"token_ids holds {highest}, but the reference's vocabulary ends before {vocab_size}")
    return LogProbJob(token_ids, call.num_prompt_tokens, call.temperature)


def _respond(request: reference_pb2.ComputeLogProbsRequest, outcome: Outcome) -> reference_pb2.ComputeLogProbsResponse:
    if isinstance(outcome, np.ndarray) and not (is_finite := np.isfinite(outcome)).all():
        place = int(is_finite.argmin())
        outcome = InvalidSample(f"the reference gives response token {place} the log-probability {outcome[place]}")
    return logprobs_to_proto(request.request_id, outcome)
