"""Reference log-probabilities on the wire (``reference.proto``)."""

from __future__ import annotations

from dataclasses import dataclass

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import Float32Array, Int32Array, InvalidSample, RetryableFailure
from rollmesh.v1 import reference_pb2 as pb
from rollmesh.v1 import reward_pb2
from rollmesh.wire import checks
from rollmesh.wire.outcome import retryable_from_proto, retryable_to_proto

LogProbsOutcome = RetryableFailure | InvalidSample
"""An answer without log-probabilities, with the reason."""


@dataclass(frozen=True, eq=False, slots=True)
class LogProbsCall:
    """The tokens whose log-probabilities the caller needs.

    Attributes:
        request_id: the id that the caller chooses, unique on the stream.
        token_ids: int32 [P + R], the prompt and the response.
        num_prompt_tokens: P, at least 1.
        temperature: the divisor of the logits; greater than 0.
    """

    request_id: str
    token_ids: Int32Array
    num_prompt_tokens: int
    temperature: float

    @property
    def num_response_tokens(self) -> int:
        """The number of response tokens R, at least 1."""
        return len(self.token_ids) - self.num_prompt_tokens


def logprobs_call_to_proto(call: LogProbsCall) -> pb.ComputeLogProbsRequest:
    return pb.ComputeLogProbsRequest(
        request_id=call.request_id,
        token_ids=checks.pack_int32(call.token_ids),
        num_prompt_tokens=call.num_prompt_tokens,
        temperature=checks.float32(call.temperature, "temperature"),
    )


def logprobs_call_from_proto(message: pb.ComputeLogProbsRequest) -> LogProbsCall:
    token_ids = checks.token_ids(message.token_ids, "token_ids")
    checks.between(message.num_prompt_tokens, 1, len(token_ids) - 1, "num_prompt_tokens")
    if not message.temperature > 0:
        checks.refuse("temperature", f"is {message.temperature}, not greater than 0")
    return LogProbsCall(
        request_id=checks.name(message.request_id, "request_id"),
        token_ids=token_ids,
        num_prompt_tokens=message.num_prompt_tokens,
        temperature=checks.shortest(checks.finite(message.temperature, "temperature")),
    )


def logprobs_to_proto(request_id: str, outcome: Float32Array | LogProbsOutcome) -> pb.ComputeLogProbsResponse:
    """Return the answer for ``outcome``: float32 [R], or the reason why there are no log-probabilities."""
    match outcome:
        case RetryableFailure():
            return pb.ComputeLogProbsResponse(request_id=request_id, retryable=retryable_to_proto(outcome))
        case InvalidSample():
            invalid = reward_pb2.InvalidSample(reason=outcome.reason)
            return pb.ComputeLogProbsResponse(request_id=request_id, invalid_sample=invalid)
    return pb.ComputeLogProbsResponse(request_id=request_id, logprobs=checks.pack_float32(outcome))


def logprobs_from_proto(message: pb.ComputeLogProbsResponse, num_tokens: int) -> Float32Array | LogProbsOutcome:
    """Return the outcome of a call with ``num_tokens`` response tokens: float32 [R], read-only, or the reason for none.

    Raises:
        InvalidArgumentError: the answer has another number of log-probabilities, a log-probability that is not finite,
            or no outcome.
    """
    match message.WhichOneof("outcome"):
        case "logprobs":
            array = checks.logprobs(message.logprobs, "logprobs")
            if len(array) != num_tokens:
                checks.refuse("logprobs", f"has {len(array)} entries for {num_tokens} tokens")
            return array
        case "retryable":
            return retryable_from_proto(message.retryable)
        case "invalid_sample":
            return InvalidSample(message.invalid_sample.reason)
    raise InvalidArgumentError("outcome is missing", "outcome")
