"""Evaluation on the wire (``coordinator.proto``)."""

from __future__ import annotations

from dataclasses import dataclass

from rollmesh.types import EvaluationResult, EvaluationSample
from rollmesh.v1 import coordinator_pb2 as pb
from rollmesh.wire import checks
from rollmesh.wire.control import Caller, caller_from_proto
from rollmesh.wire.enums import STOP_REASONS
from rollmesh.wire.limits import MAX_SAMPLES
from rollmesh.wire.trajectory import required_version, version_to_proto


@dataclass(frozen=True, slots=True)
class ReportEvaluationCall:
    """The result of one evaluation lease: its samples, or no samples and the reason of the failure."""

    caller: Caller
    group_id: str
    fencing_token: int
    samples: tuple[EvaluationSample, ...]
    failure: str


def report_evaluation_to_proto(call: ReportEvaluationCall) -> pb.ReportEvaluationRequest:
    return pb.ReportEvaluationRequest(
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        group_id=call.group_id,
        fencing_token=call.fencing_token,
        samples=[evaluation_sample_to_proto(sample) for sample in call.samples],
        failure=call.failure,
    )


def report_evaluation_from_proto(message: pb.ReportEvaluationRequest) -> ReportEvaluationCall:
    checks.at_most(message.samples, MAX_SAMPLES, "samples")
    failure = checks.text(message.failure, "failure")
    if not message.samples and not failure:
        checks.refuse("samples", "is empty, without a failure")
    return ReportEvaluationCall(
        caller=caller_from_proto(message),
        group_id=checks.name(message.group_id, "group_id"),
        fencing_token=message.fencing_token,
        samples=tuple(evaluation_sample_from_proto(s, f"samples[{i}]") for i, s in enumerate(message.samples)),
        failure=failure,
    )


def evaluation_sample_to_proto(sample: EvaluationSample) -> pb.EvaluationSample:
    return pb.EvaluationSample(
        reward=checks.float32(sample.reward, "reward"),
        score=checks.float32(sample.score, "score"),
        num_generated_tokens=sample.num_generated_tokens,
        stop_reason=STOP_REASONS.to_proto(sample.stop_reason),
        oldest_version=version_to_proto(sample.oldest_version),
        newest_version=version_to_proto(sample.newest_version),
        extra_logs=checks.named_numbers(sample.extra_logs, "extra_logs"),
    )


def evaluation_sample_from_proto(message: pb.EvaluationSample, field: str = "sample") -> EvaluationSample:
    return EvaluationSample(
        reward=checks.finite(message.reward, f"{field}.reward"),
        score=checks.finite(message.score, f"{field}.score"),
        num_generated_tokens=message.num_generated_tokens,
        stop_reason=STOP_REASONS.from_proto(message.stop_reason, f"{field}.stop_reason"),
        oldest_version=required_version(message, "oldest_version", field),
        newest_version=required_version(message, "newest_version", field),
        extra_logs=checks.named_numbers(message.extra_logs, f"{field}.extra_logs"),
    )


def evaluation_result_to_proto(result: EvaluationResult) -> pb.EvaluationResult:
    return pb.EvaluationResult(
        version=version_to_proto(result.version),
        step=result.step,
        num_prompts=result.num_prompts,
        num_failed=result.num_failed,
        pass_at_1=result.pass_at_1,
        pass_at_1_stderr=result.pass_at_1_stderr,
        mean_generated_tokens=result.mean_generated_tokens,
        truncation_rate=result.truncation_rate,
        details=checks.named_numbers(result.details, "details"),
    )


def evaluation_result_from_proto(message: pb.EvaluationResult, field: str = "evaluation_result") -> EvaluationResult:
    """Return the result of a round. The means are NaN where every prompt of the round failed."""
    return EvaluationResult(
        version=required_version(message, "version", field),
        step=message.step,
        num_prompts=message.num_prompts,
        num_failed=message.num_failed,
        pass_at_1=message.pass_at_1,
        pass_at_1_stderr=message.pass_at_1_stderr,
        mean_generated_tokens=message.mean_generated_tokens,
        truncation_rate=message.truncation_rate,
        details=checks.named_numbers(message.details, f"{field}.details"),
    )
