"""The stored form of a group: a small msgpack header, then the arrays of all samples as four raw columns.

Layout of schema 3, little-endian throughout::

    "RMG" | schema: u8 | length of the header: u32 | header | zeros up to a multiple of 4
    int32   prompts    [sum of P] | int32   responses   [sum of R]
    float32 logprobs   [sum of G] | float32 references  [sum of R over the samples with references]

P, R and G are the numbers of prompt, response and generated tokens of one sample. The header is a map with the fields
of `Header`: values of the whole group, and lists with one item for each sample, turn or version span. Each column holds
the samples in the order of the group. The turns of a sample add up to its response, and its version spans to its
generated tokens.

Packing copies the arrays once, and reading copies nothing. Two passes check all numbers, whatever the number of
samples. Packing and reading check the same rules: a group that could not be read back is not stored, and bytes that
break a rule are refused before they become an array.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from typing import Any

import msgpack
import numpy as np

from rollmesh.errors import InvalidArgumentError
from rollmesh.replay.header import FIELD_NAMES, STOP_REASONS, Header, check_header, refusal, split
from rollmesh.types import (
    Float32Array,
    Group,
    Int32Array,
    PolicyVersion,
    PromptId,
    Sample,
    Score,
    Turn,
    VersionSpan,
)

MAGIC = b"RMG"
SCHEMA = 3
SCHEMA_WITHOUT_DATASOURCE = 2
"""Schema of groups that earlier versions of RollMesh stored. Such groups can be read."""
PREFIX = struct.Struct("<3sBI")
"""Magic, schema, length of the header."""
_ITEM_BYTES = 4
_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


def encode_group(group: Group) -> bytes:
    """Pack a group: 12 bytes per generated token with a reference, 8 without a reference, 4 per prompt token.

    A sample of 100 prompt tokens and 500 generated tokens with references takes 400 + 6,000 bytes and its header.

    Raises:
        InvalidArgumentError: the group breaks a rule of `rollmesh.types`; ``field`` says which.
    """
    if not group.samples:
        raise InvalidArgumentError(f"group {group.group_id} has no samples", "samples")
    header, columns = _header_of(group), _columns_of(group)
    check_header(header)
    packed = msgpack.packb(vars(header))
    start = PREFIX.size + len(packed)
    padding = bytes(-start % _ITEM_BYTES)
    payload = b"".join((PREFIX.pack(MAGIC, SCHEMA, len(packed)), packed, padding, *columns))
    _check_numbers(header, *_numbers(payload, start + len(padding), header))
    return payload


def decode_group(payload: bytes) -> Group:
    """Return the group that `encode_group` packed. The arrays are read-only views of ``payload``, and keep it alive.

    Raises:
        InvalidArgumentError: ``payload`` is not a packed group; ``field`` says where it breaks a rule.
    """
    header, start = _unpack_header(payload)
    check_header(header)
    tokens, values = _numbers(payload, start, header)
    _check_numbers(header, tokens, values)
    prompt_id = PromptId(*header.prompt_id)
    samples = tuple(_samples(header, prompt_id, tokens, values))
    return Group(header.group_id, prompt_id, header.sequence, header.attempt, samples, header.datasource)


def _header_of(group: Group) -> Header:
    samples, prompt_id = group.samples, group.prompt_id
    turns = [turn for sample in samples for turn in sample.turns]
    spans = [span for sample in samples for span in sample.version_spans]
    return Header(
        group_id=group.group_id,
        prompt_id=[prompt_id.dataset, prompt_id.epoch, prompt_id.index],
        sequence=group.sequence,
        attempt=group.attempt,
        datasource=group.datasource,
        sample_ids=[sample.sample_id for sample in samples],
        indexes=[sample.index for sample in samples],
        prompt_lengths=[len(sample.prompt_token_ids) for sample in samples],
        response_lengths=[len(sample.response_token_ids) for sample in samples],
        has_reference=[sample.reference_logprobs is not None for sample in samples],
        scores=[_score_item(sample.score) for sample in samples],
        num_turns=[len(sample.turns) for sample in samples],
        generated_tokens=[turn.num_generated_tokens for turn in turns],
        environment_tokens=[turn.num_environment_tokens for turn in turns],
        stop_reasons=[turn.stop_reason.value for turn in turns],
        num_versions=[len(sample.version_spans) for sample in samples],
        lineages=[span.version.lineage for span in spans],
        numbers=[span.version.number for span in spans],
        span_lengths=[span.length for span in spans],
    )


def _score_item(score: Score | None) -> list[Any] | None:
    if score is None:
        return None
    logs = {str(name): float(value) for name, value in score.extra_logs.items()}
    return [float(score.reward), float(score.score), logs]


def _columns_of(group: Group) -> Iterable[memoryview]:
    """Return the arrays in stored order, each contiguous and of its stored type."""
    prompts, responses, logprobs, references = [], [], [], []
    for i, sample in enumerate(group.samples):
        _check_arrays(sample, group.prompt_id, f"samples[{i}]")
        prompts.append(_stored(sample.prompt_token_ids, _INT32))
        responses.append(_stored(sample.response_token_ids, _INT32))
        logprobs.append(_stored(sample.behaviour_logprobs, _FLOAT32))
        if sample.reference_logprobs is not None:
            references.append(_stored(sample.reference_logprobs, _FLOAT32))
    return itertools.chain(prompts, responses, logprobs, references)


def _stored(array: Int32Array | Float32Array, dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).data


def _check_arrays(sample: Sample, prompt_id: PromptId, field: str) -> None:
    """Check the values that are not stored and that a reader derives: array lengths, span starts, prompt ids."""
    if sample.prompt_id != prompt_id:
        raise InvalidArgumentError(f"{field} is of prompt {sample.prompt_id}, not {prompt_id}", field)
    num_generated, num_response = sample.num_generated_tokens, len(sample.response_token_ids)
    if sample.behaviour_logprobs.shape != (num_generated,):
        what = f"has shape {sample.behaviour_logprobs.shape} for {num_generated} generated tokens"
        raise refusal(field, "logprobs", what)
    reference = sample.reference_logprobs
    if reference is not None and reference.shape != (num_response,):
        raise refusal(field, "reference", f"has shape {reference.shape} for {num_response} response tokens")
    for name, ids in (("prompt", sample.prompt_token_ids), ("response", sample.response_token_ids)):
        if ids.ndim != 1:
            raise refusal(field, name, f"has {ids.ndim} dimensions, not one")
    end = 0
    for span in sample.version_spans:
        if span.start != end:
            raise refusal(field, "versions", f"leave a gap or overlap at {span.start}")
        end += span.length


def _unpack_header(payload: bytes) -> tuple[Header, int]:
    """Return the header, and the position of the first column in bytes."""
    if len(payload) < PREFIX.size:
        raise InvalidArgumentError(f"payload has {len(payload)} bytes and no header", "payload")
    magic, schema, length = PREFIX.unpack_from(payload)
    if magic != MAGIC:
        raise InvalidArgumentError(f"payload begins with {magic!r}, not {MAGIC!r}", "payload")
    if schema not in (SCHEMA, SCHEMA_WITHOUT_DATASOURCE):
        raise InvalidArgumentError(f"payload has schema {schema}, this version reads {SCHEMA}", "payload.schema")
    end = PREFIX.size + length
    if end > len(payload):
        raise InvalidArgumentError(f"payload has {len(payload)} bytes, its header ends at {end}", "payload")
    try:
        tree = msgpack.unpackb(payload[PREFIX.size : end], strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise InvalidArgumentError(f"the payload's header is not msgpack: {error}", "payload") from error
    if not isinstance(tree, dict):
        raise InvalidArgumentError(f"the payload's header is a {type(tree).__name__}, not a map", "payload")
    if schema == SCHEMA_WITHOUT_DATASOURCE:
        tree = {"datasource": "", **tree}
    if missing := [name for name in FIELD_NAMES if name not in tree]:
        raise refusal("payload", missing[0], "is missing")
    if len(tree) != len(FIELD_NAMES):
        raise InvalidArgumentError(f"the payload's header has fields beside {', '.join(FIELD_NAMES)}", "payload")
    return Header(**tree), end + -end % _ITEM_BYTES


def _numbers(payload: bytes, start: int, header: Header) -> tuple[Int32Array, Float32Array]:
    """Return the columns as two views: prompts and responses, then log-probabilities and references."""
    num_tokens = sum(header.prompt_lengths) + sum(header.response_lengths)
    num_values = sum(header.generated_lengths()) + sum(header.reference_lengths())
    if len(payload) != start + _ITEM_BYTES * (num_tokens + num_values):
        raise InvalidArgumentError(
            f"payload has {len(payload)} bytes, its header speaks of {num_tokens} token ids and {num_values} values "
            f"from byte {start} on",
            "payload",
        )
    tokens = np.frombuffer(payload, _INT32, num_tokens, start)
    values = np.frombuffer(payload, _FLOAT32, num_values, start + _ITEM_BYTES * num_tokens)
    return tokens.astype(np.int32, copy=False), values.astype(np.float32, copy=False)


def _check_numbers(header: Header, tokens: Int32Array, values: Float32Array) -> None:
    """Refuse negative token ids and values that are not finite. The error names the sample and the array."""
    if len(tokens) and tokens.min() < 0:
        columns = (("prompt", header.prompt_lengths), ("response", header.response_lengths))
        raise refusal(*_owner(int(np.argmax(tokens < 0)), columns), "has a negative token id")
    if not (is_finite := np.isfinite(values)).all():
        columns = (("logprobs", header.generated_lengths()), ("reference", header.reference_lengths()))
        raise refusal(*_owner(int(np.argmin(is_finite)), columns), "has a value that is not finite")


def _owner(position: int, columns: Iterable[tuple[str, list[int]]]) -> tuple[str, str]:
    """Return the sample and the array that hold a number, as an error names them.

    Position 5 of prompts with the lengths [3, 4] is ("samples[1]", "prompt").

    Args:
        position: index of the number in one of the two views that `_numbers` returns.
        columns: the view's columns in order: the name of the array, and its length in each sample.
    """
    for name, lengths in columns:
        for i, length in enumerate(lengths):
            if position < length:
                return f"samples[{i}]", name
            position -= length
    raise AssertionError(f"position {position} lies behind all columns")


def _samples(header: Header, prompt_id: PromptId, tokens: Int32Array, values: Float32Array) -> Iterable[Sample]:
    num_prompt, generated_lengths = sum(header.prompt_lengths), header.generated_lengths()
    prompts = split(tokens[:num_prompt], header.prompt_lengths)
    responses = split(tokens[num_prompt:], header.response_lengths)
    num_generated = sum(generated_lengths)
    logprobs = split(values[:num_generated], generated_lengths)
    references = split(values[num_generated:], header.reference_lengths())
    reasons = [STOP_REASONS[reason] for reason in header.stop_reasons]
    turns = list(map(Turn, header.generated_tokens, header.environment_tokens, reasons))
    pairs = list(zip(header.lineages, header.numbers, strict=True))
    # A group has few versions, and many spans of each version.
    versions = {pair: PolicyVersion(*pair) for pair in set(pairs)}
    runs = list(zip(map(versions.__getitem__, pairs), header.span_lengths, strict=True))
    for i, (sample_turns, sample_runs) in enumerate(
        zip(split(turns, header.num_turns), split(runs, header.num_versions), strict=True)
    ):
        score = header.scores[i]
        yield Sample(
            sample_id=header.sample_ids[i],
            index=header.indexes[i],
            prompt_id=prompt_id,
            prompt_token_ids=prompts[i],
            response_token_ids=responses[i],
            turns=tuple(sample_turns),
            behaviour_logprobs=logprobs[i],
            version_spans=_spans(sample_runs),
            score=None if score is None else Score(*score),
            reference_logprobs=references[i] if header.has_reference[i] else None,
        )


def _spans(runs: Iterable[tuple[PolicyVersion, int]]) -> tuple[VersionSpan, ...]:
    spans, start = [], 0
    for version, length in runs:
        spans.append(VersionSpan(version, start, length))
        start += length
    return tuple(spans)
