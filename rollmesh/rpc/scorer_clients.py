"""Calls the services that judge finished samples, reward and reference, over one channel and one stream each.

A client makes one try: the client returns the server's answer, and raises where the server gave no answer. The user of
the client decides whether to try again. An answer that breaks the contract counts as a `RetryableFailure`, never as a
score.
"""

from __future__ import annotations

import grpc
import grpc.aio
import numpy as np

from rollmesh.errors import ConfigError, InvalidArgumentError, RollMeshError, UnavailableError
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.multiplex import StreamCaller
from rollmesh.rpc.retry import call_unary
from rollmesh.types import Float32Array, InvalidSample, RetryableFailure, RewardInfo, Sample, ScoreOutcome
from rollmesh.v1 import reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from rollmesh.wire.logprobs import LogProbsCall, logprobs_call_to_proto, logprobs_from_proto
from rollmesh.wire.outcome import ScoreCall, outcome_from_proto, reward_info_from_proto, score_call_to_proto

_NUM_LOGPROB_CALLS = 256
_INFO_TIMEOUT_S = 10.0


class RewardClient:
    """A reward server, ours or a user's. Belongs to the running event loop.

    Args:
        address: "host:port".
        place: the configuration path of the address, for errors.

    Raises:
        ConfigError: the address is malformed.
    """

    def __init__(self, address: str, place: str = "reward.address") -> None:
        self._channel = open_channel(address, place)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._address = address
        self._place = place
        self._stream: StreamCaller[reward_pb2.ScoreRequest, reward_pb2.ScoreResponse] | None = None

    async def connect(self, timeout_s: float) -> RewardInfo:
        """Ask the server for its name and for the number of samples that it takes at a time. Call this before `score`.

        Raises:
            ConfigError: the server at this address is no reward server.
            UnavailableError, DeadlineError: no server answered within ``timeout_s``.
        """
        peer = f"reward server {self._address}"
        try:
            answer = await call_unary(
                self._stub.GetRewardInfo,
                reward_pb2.GetRewardInfoRequest(),
                timeout_s=timeout_s,
                attempt_timeout_s=_INFO_TIMEOUT_S,
                peer=peer,
            )
        except RollMeshError as error:
            status = error.__cause__
            if not isinstance(status, grpc.aio.AioRpcError) or status.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            raise ConfigError(
                self._place,
                f"{self._address!r} does not serve rollmesh.v1.RewardService",
                "name the address of a reward server",
            ) from error
        info = reward_info_from_proto(answer)
        self._stream = StreamCaller(self._stub.Score, peer=peer, max_in_flight=info.max_in_flight)
        return info

    async def score(self, call: ScoreCall, timeout_s: float) -> ScoreOutcome:
        """Ask the server to score one sample.

        Raises:
            UnavailableError: the server cannot be reached, or went away before the answer.
            DeadlineError: the server did not answer within ``timeout_s``.
        """
        if self._stream is None:
            raise UnavailableError(f"reward server {self._address}: not connected yet")

        def build(request_id: str) -> reward_pb2.ScoreRequest:
            return score_call_to_proto(call, request_id, timeout_s)

        response = await self._stream.call(build, timeout_s)
        try:
            return outcome_from_proto(response)
        except InvalidArgumentError as error:
            return RetryableFailure(f"the reward server's answer is not valid: {error}")

    async def close(self, timeout_s: float = 1.0) -> None:
        """Give samples in flight ``timeout_s`` to be answered, then close stream and channel."""
        if self._stream is not None:
            await self._stream.close(timeout_s)
        await self._channel.close()


class ReferenceClient:
    """The reference service. Belongs to the running event loop.

    Args:
        address: "host:port".
        place: the configuration path of the address, for errors.

    Raises:
        ConfigError: the address is malformed.
    """

    def __init__(self, address: str, place: str = "reference.address") -> None:
        self._channel = open_channel(address, place)
        stub = reference_pb2_grpc.ReferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream: StreamCaller[reference_pb2.ComputeLogProbsRequest, reference_pb2.ComputeLogProbsResponse] = (
            StreamCaller(stub.ComputeLogProbs, peer=f"reference {address}", max_in_flight=_NUM_LOGPROB_CALLS)
        )

    async def compute_logprobs(
        self, sample: Sample, temperature: float, timeout_s: float
    ) -> Float32Array | RetryableFailure | InvalidSample:
        """Return the frozen policy's log-probabilities of the response: float32 [R].

        Raises:
            UnavailableError: the service cannot be reached, or went away before the answer.
            DeadlineError: the service did not answer within ``timeout_s``.
        """

        def build(request_id: str) -> reference_pb2.ComputeLogProbsRequest:
            token_ids = np.concatenate((sample.prompt_token_ids, sample.response_token_ids))
            num_prompt_tokens = len(sample.prompt_token_ids)
            return logprobs_call_to_proto(LogProbsCall(request_id, token_ids, num_prompt_tokens, temperature))

        response = await self._stream.call(build, timeout_s)
        try:
            return logprobs_from_proto(response, len(sample.response_token_ids))
        except InvalidArgumentError as error:
            return RetryableFailure(f"the reference's answer is not valid: {error}")

    async def close(self, timeout_s: float = 1.0) -> None:
        """Give samples in flight ``timeout_s`` to be answered, then close stream and channel."""
        await self._stream.close(timeout_s)
        await self._channel.close()
