"""Versions, prompts and samples on the wire (``trajectory.proto``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollmesh.types import PolicyVersion, PromptId, Sample, Turn, VersionSpan
from rollmesh.v1 import trajectory_pb2 as pb
from rollmesh.wire import checks
from rollmesh.wire.enums import STOP_REASONS
from rollmesh.wire.limits import MAX_TURNS, MAX_VERSION_SPANS


def version_to_proto(version: PolicyVersion | None) -> pb.PolicyVersion | None:
    """None, for "no version yet", is an absent message: generated constructors take None as that."""
    return None if version is None else pb.PolicyVersion(lineage=version.lineage, number=version.number)


def required_version(message: Any, name: str, parent: str = "") -> PolicyVersion:
    """The version in the field ``name`` of ``message``, which must be present."""
    version: pb.PolicyVersion = checks.required(message, name, parent)
    return PolicyVersion(version.lineage, version.number)


def optional_version(message: Any, name: str) -> PolicyVersion | None:
    """The version in the field ``name`` of ``message``; None where it is absent."""
    return required_version(message, name) if message.HasField(name) else None


def prompt_id_to_proto(prompt_id: PromptId) -> pb.PromptId:
    return pb.PromptId(dataset=prompt_id.dataset, epoch=prompt_id.epoch, index=prompt_id.index)


def prompt_id_from_proto(message: pb.PromptId, field: str = "prompt_id") -> PromptId:
    return PromptId(checks.name(message.dataset, f"{field}.dataset"), message.epoch, message.index)


def turn_to_proto(turn: Turn) -> pb.Turn:
    return pb.Turn(
        num_generated_tokens=turn.num_generated_tokens,
        num_environment_tokens=turn.num_environment_tokens,
        stop_reason=STOP_REASONS.to_proto(turn.stop_reason),
    )


def turn_from_proto(message: pb.Turn, field: str = "turn") -> Turn:
    return Turn(
        message.num_generated_tokens,
        message.num_environment_tokens,
        STOP_REASONS.from_proto(message.stop_reason, f"{field}.stop_reason"),
    )


def version_span_to_proto(span: VersionSpan) -> pb.VersionSpan:
    return pb.VersionSpan(version=version_to_proto(span.version), start=span.start, length=span.length)


def version_span_from_proto(message: pb.VersionSpan, field: str = "version_span") -> VersionSpan:
    return VersionSpan(required_version(message, "version", field), message.start, message.length)


def sample_to_proto(sample: Sample) -> pb.Sample:
    """The trajectory alone: a sample's score and reference log-probabilities are answers, never sent along."""
    return pb.Sample(
        sample_id=sample.sample_id,
        index=sample.index,
        prompt_id=prompt_id_to_proto(sample.prompt_id),
        prompt_token_ids=checks.pack_int32(sample.prompt_token_ids),
        response_token_ids=checks.pack_int32(sample.response_token_ids),
        turns=[turn_to_proto(turn) for turn in sample.turns],
        behaviour_logprobs=checks.pack_float32(sample.behaviour_logprobs),
        version_spans=[version_span_to_proto(span) for span in sample.version_spans],
    )


def sample_from_proto(message: pb.Sample, field: str = "sample") -> Sample:
    """The sample, unscored; its arrays are read-only views of the message's bytes.

    Raises:
        InvalidArgumentError: an array is not one of its type; there is no prompt or no generated token; the turns do
            not tile the response; the spans do not tile the generated tokens; or as many log-probabilities as
            generated tokens are neither there nor absent.
    """
    prompt_token_ids = checks.token_ids(message.prompt_token_ids, f"{field}.prompt_token_ids")
    if not prompt_token_ids.size:
        checks.refuse(f"{field}.prompt_token_ids", "is empty")
    response_token_ids = checks.token_ids(message.response_token_ids, f"{field}.response_token_ids")
    turns = _turns_from_proto(message.turns, len(response_token_ids), f"{field}.turns")
    num_generated_tokens = sum(turn.num_generated_tokens for turn in turns)
    behaviour_logprobs = checks.logprobs(message.behaviour_logprobs, f"{field}.behaviour_logprobs")
    if len(behaviour_logprobs) not in (0, num_generated_tokens):
        checks.refuse(
            f"{field}.behaviour_logprobs",
            f"has {len(behaviour_logprobs)} entries for {num_generated_tokens} generated tokens",
        )
    return Sample(
        sample_id=checks.name(message.sample_id, f"{field}.sample_id"),
        index=message.index,
        prompt_id=prompt_id_from_proto(checks.required(message, "prompt_id", field), f"{field}.prompt_id"),
        prompt_token_ids=prompt_token_ids,
        response_token_ids=response_token_ids,
        turns=turns,
        behaviour_logprobs=behaviour_logprobs,
        version_spans=_spans_from_proto(message.version_spans, num_generated_tokens, f"{field}.version_spans"),
    )


def _turns_from_proto(messages: Sequence[pb.Turn], num_response_tokens: int, field: str) -> tuple[Turn, ...]:
    checks.at_most(messages, MAX_TURNS, field)
    turns = tuple(turn_from_proto(message, f"{field}[{i}]") for i, message in enumerate(messages))
    num_generated_tokens = sum(turn.num_generated_tokens for turn in turns)
    num_tokens = num_generated_tokens + sum(turn.num_environment_tokens for turn in turns)
    if num_tokens != num_response_tokens:
        checks.refuse(field, f"cover {num_tokens} tokens of a response of {num_response_tokens}")
    if num_generated_tokens == 0:
        checks.refuse(field, "have no generated token")
    return turns


def _spans_from_proto(
    messages: Sequence[pb.VersionSpan], num_generated_tokens: int, field: str
) -> tuple[VersionSpan, ...]:
    checks.at_most(messages, MAX_VERSION_SPANS, field)
    spans = tuple(version_span_from_proto(message, f"{field}[{i}]") for i, message in enumerate(messages))
    end = 0
    for i, span in enumerate(spans):
        if span.start != end or span.length == 0:
            checks.refuse(
                f"{field}[{i}]", f"is [{span.start}, {span.start + span.length}), after a span ending at {end}"
            )
        end += span.length
    if end != num_generated_tokens:
        checks.refuse(field, f"end at {end} of {num_generated_tokens} generated tokens")
    return spans
