"""Scoring on the wire (``reward.proto``): the sample to score, and the four ways to answer."""

from __future__ import annotations

from dataclasses import dataclass

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import InvalidSample, PolicyFault, RetryableFailure, RewardInfo, Sample, Score, ScoreOutcome
from rollmesh.v1 import reward_pb2 as pb
from rollmesh.wire import checks
from rollmesh.wire.trajectory import sample_from_proto, sample_to_proto

_DEFAULT_MAX_IN_FLIGHT = 256


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """One sample to score, and what the reward server is told with it.

    Attributes:
        sample: the trajectory; not yet scored.
        prompt_text: the rendered prompt, before any truncation.
        query_text: prompt and response decoded together, special tokens kept.
        label_json: the dataset's label; empty where there is none.
        datasource: the name of the dataset that the prompt came from.
    """

    sample: Sample
    prompt_text: str
    query_text: str
    label_json: str
    datasource: str


def score_call_to_proto(call: ScoreCall, request_id: str, deadline_s: float) -> pb.ScoreRequest:
    """Return the request that asks for a score on a stream.

    Args:
        call: the sample.
        request_id: the caller chooses the id, which is unique on the stream.
        deadline_s: after this time the caller has no use for an answer.
    """
    return pb.ScoreRequest(
        request_id=request_id,
        sample=sample_to_proto(call.sample),
        prompt_text=call.prompt_text,
        query_text=call.query_text,
        label_json=call.label_json,
        datasource=call.datasource,
        deadline_ms=checks.milliseconds(deadline_s, "deadline_ms"),
    )


def score_call_from_proto(message: pb.ScoreRequest) -> ScoreCall:
    return ScoreCall(
        sample=sample_from_proto(checks.required(message, "sample")),
        prompt_text=checks.text(message.prompt_text, "prompt_text"),
        query_text=checks.text(message.query_text, "query_text"),
        label_json=checks.text(message.label_json, "label_json"),
        datasource=checks.text(message.datasource, "datasource"),
    )


def outcome_to_proto(request_id: str, outcome: ScoreOutcome) -> pb.ScoreResponse:
    """Return the answer for an outcome. Raises InvalidArgumentError where float32 cannot hold a number as finite."""
    match outcome:
        case Score():
            return pb.ScoreResponse(request_id=request_id, score=_score_to_proto(outcome))
        case RetryableFailure():
            return pb.ScoreResponse(request_id=request_id, retryable=retryable_to_proto(outcome))
        case InvalidSample():
            return pb.ScoreResponse(request_id=request_id, invalid_sample=pb.InvalidSample(reason=outcome.reason))
        case PolicyFault():
            penalty = checks.float32(outcome.penalty, "policy_fault.penalty")
            return pb.ScoreResponse(
                request_id=request_id, policy_fault=pb.PolicyFault(reason=outcome.reason, penalty=penalty)
            )


def outcome_from_proto(message: pb.ScoreResponse) -> ScoreOutcome:
    """Return the outcome of an answer.

    Raises:
        InvalidArgumentError: the answer has no outcome, or a number that is not finite.
    """
    match message.WhichOneof("outcome"):
        case "score":
            return _score_from_proto(message.score)
        case "retryable":
            return retryable_from_proto(message.retryable)
        case "invalid_sample":
            return InvalidSample(message.invalid_sample.reason)
        case "policy_fault":
            fault = message.policy_fault
            return PolicyFault(fault.reason, checks.finite(fault.penalty, "policy_fault.penalty"))
    raise InvalidArgumentError("outcome is missing", "outcome")


def retryable_to_proto(failure: RetryableFailure) -> pb.RetryableFailure:
    retry_after_ms = checks.milliseconds(failure.retry_after_s, "retryable.retry_after_ms")
    return pb.RetryableFailure(reason=failure.reason, retry_after_ms=retry_after_ms)


def retryable_from_proto(message: pb.RetryableFailure) -> RetryableFailure:
    return RetryableFailure(message.reason, message.retry_after_ms / 1000)


def reward_info_to_proto(info: RewardInfo) -> pb.GetRewardInfoResponse:
    return pb.GetRewardInfoResponse(name=info.name, max_in_flight=info.max_in_flight)


def reward_info_from_proto(message: pb.GetRewardInfoResponse) -> RewardInfo:
    return RewardInfo(checks.text(message.name, "name"), message.max_in_flight or _DEFAULT_MAX_IN_FLIGHT)


def _score_to_proto(score: Score) -> pb.Score:
    return pb.Score(
        reward=checks.float32(score.reward, "score.reward"),
        score=checks.float32(score.score, "score.score"),
        extra_logs=checks.named_numbers(score.extra_logs, "score.extra_logs"),
    )


def _score_from_proto(message: pb.Score) -> Score:
    return Score(
        reward=checks.finite(message.reward, "score.reward"),
        score=checks.finite(message.score, "score.score"),
        extra_logs=checks.named_numbers(message.extra_logs, "score.extra_logs"),
    )
