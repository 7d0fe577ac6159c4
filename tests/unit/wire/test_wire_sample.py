"""Samples cross the wire whole. A reader refuses a bad sample and names the bad field."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import PolicyVersion, PromptId, Sample, StopReason, Turn, VersionSpan
from rollmesh.v1 import trajectory_pb2 as pb
from rollmesh.wire import limits
from rollmesh.wire.trajectory import sample_from_proto, sample_to_proto


def make_sample() -> Sample:
    return Sample(
        sample_id="train:0:1/0/0",
        index=0,
        prompt_id=PromptId("train", 0, 1),
        prompt_token_ids=np.arange(3, dtype=np.int32),
        response_token_ids=np.arange(5, dtype=np.int32),
        turns=(Turn(2, 2, StopReason.ENVIRONMENT), Turn(1, 0, StopReason.STOP)),
        behaviour_logprobs=np.array([-1.0, -2.0, -3.0], np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, 1), 0, 2), VersionSpan(PolicyVersion(0, 2), 2, 1)),
    )


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    turns = draw(
        st.lists(
            st.builds(Turn, st.integers(0, 9), st.integers(0, 9), st.sampled_from(StopReason)), min_size=1, max_size=5
        ).filter(lambda turns: any(turn.num_generated_tokens for turn in turns))
    )
    num_generated = sum(turn.num_generated_tokens for turn in turns)
    num_response = num_generated + sum(turn.num_environment_tokens for turn in turns)
    cuts = sorted(draw(st.sets(st.integers(1, num_generated - 1), max_size=4))) if num_generated > 1 else []
    spans = tuple(
        VersionSpan(PolicyVersion(0, i), start, end - start)
        for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, num_generated], strict=True))
    )
    tokens = st.integers(0, 2**31 - 1)
    logprob = st.floats(-(2.0**99), 0, width=32)
    has_logprobs = draw(st.booleans())
    logprobs = draw(st.lists(logprob, min_size=num_generated, max_size=num_generated)) if has_logprobs else []
    return Sample(
        sample_id=draw(st.from_regex(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,20}", fullmatch=True)),
        index=draw(st.integers(0, 2**32 - 1)),
        prompt_id=PromptId("train", draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**64 - 1))),
        prompt_token_ids=np.array(draw(st.lists(tokens, min_size=1, max_size=9)), np.int32),
        response_token_ids=np.array(draw(st.lists(tokens, min_size=num_response, max_size=num_response)), np.int32),
        turns=tuple(turns),
        behaviour_logprobs=np.array(logprobs, np.float32),
        version_spans=spans,
    )


@settings(max_examples=50, deadline=None)
@given(samples())
def test_any_sample_survives_the_wire(sample: Sample) -> None:
    back = sample_from_proto(pb.Sample.FromString(sample_to_proto(sample).SerializeToString()))
    for name in ("prompt_token_ids", "response_token_ids", "behaviour_logprobs"):
        expected, actual = getattr(sample, name), getattr(back, name)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    for name in ("sample_id", "index", "prompt_id", "turns", "version_spans", "score", "reference_logprobs"):
        assert getattr(back, name) == getattr(sample, name)


def test_arrays_of_the_other_byte_order_are_written_in_the_order_of_the_wire() -> None:
    sample = make_sample()
    swapped = Sample(**{**vars(sample), "response_token_ids": sample.response_token_ids.astype(">i4")})
    assert sample_to_proto(swapped).response_token_ids == sample_to_proto(sample).response_token_ids


def test_arrays_with_gaps_in_memory_are_written_without() -> None:
    sample = make_sample()
    strided = Sample(**{**vars(sample), "prompt_token_ids": np.arange(6, dtype=np.int32)[::2]})
    assert sample_from_proto(sample_to_proto(strided)).prompt_token_ids.tolist() == [0, 2, 4]


def test_token_ids_that_are_not_integers_are_not_written() -> None:
    floats = Sample(**{**vars(make_sample()), "prompt_token_ids": np.array([1.5])})
    with pytest.raises(TypeError):
        sample_to_proto(floats)


def test_arrays_are_read_only_views() -> None:
    sample = sample_from_proto(sample_to_proto(make_sample()))
    with pytest.raises(ValueError, match="read-only"):
        sample.response_token_ids[0] = 7


def _set(name: str, value: object) -> Callable[[pb.Sample], None]:
    return lambda message: setattr(message, name, value)


def _edit(edit: Callable[[pb.Sample], object]) -> Callable[[pb.Sample], None]:
    def run(message: pb.Sample) -> None:
        edit(message)

    return run


_INT32 = np.dtype("<i4")

FAULTS: list[tuple[str, Callable[[pb.Sample], None]]] = [
    ("sample.sample_id", _set("sample_id", "")),
    ("sample.sample_id", _set("sample_id", "train:0:1\0/0")),
    ("sample.sample_id", _set("sample_id", "x" * (limits.MAX_NAME_BYTES + 1))),
    ("sample.prompt_id", _edit(lambda m: m.ClearField("prompt_id"))),
    ("sample.prompt_id.dataset", _edit(lambda m: m.prompt_id.ClearField("dataset"))),
    ("sample.prompt_token_ids", _set("prompt_token_ids", b"")),
    ("sample.prompt_token_ids", _set("prompt_token_ids", b"\0\0\0\0\0")),
    ("sample.prompt_token_ids", _set("prompt_token_ids", np.array([-1], _INT32).tobytes())),
    ("sample.prompt_token_ids", _set("prompt_token_ids", bytes(4 * (limits.MAX_TOKENS + 1)))),
    ("sample.response_token_ids", _set("response_token_ids", b"\0\0\0")),
    ("sample.response_token_ids", _set("response_token_ids", bytes(4 * (limits.MAX_TOKENS + 1)))),
    ("sample.turns", _set("response_token_ids", bytes(4 * 6))),
    ("sample.turns", _edit(lambda m: m.ClearField("turns"))),
    ("sample.turns", _edit(lambda m: m.turns.add(num_environment_tokens=1, stop_reason=pb.STOP_REASON_STOP))),
    ("sample.turns", _edit(lambda m: m.turns.extend([pb.Turn(stop_reason=pb.STOP_REASON_STOP)] * limits.MAX_TURNS))),
    ("sample.turns[1].stop_reason", _edit(lambda m: m.turns[1].ClearField("stop_reason"))),
    ("sample.turns[0].stop_reason", _edit(lambda m: m.turns[0].MergeFromString(b"\x18\x63"))),
    ("sample.behaviour_logprobs", _set("behaviour_logprobs", bytes(4 * 2))),
    ("sample.behaviour_logprobs", _set("behaviour_logprobs", bytes(11))),
    ("sample.behaviour_logprobs", _set("behaviour_logprobs", np.array([0, np.nan, 0], "<f4").tobytes())),
    ("sample.behaviour_logprobs", _set("behaviour_logprobs", np.array([0, -np.inf, 0], "<f4").tobytes())),
    ("sample.version_spans", _edit(lambda m: m.ClearField("version_spans"))),
    ("sample.version_spans", _edit(lambda m: m.version_spans.pop())),
    ("sample.version_spans", _edit(lambda m: setattr(m.version_spans[1], "length", 2))),
    ("sample.version_spans[1]", _edit(lambda m: setattr(m.version_spans[1], "start", 1))),
    ("sample.version_spans[1]", _edit(lambda m: setattr(m.version_spans[1], "length", 0))),
    ("sample.version_spans[0]", _edit(lambda m: m.version_spans.reverse())),
    ("sample.version_spans[0].version", _edit(lambda m: m.version_spans[0].ClearField("version"))),
]


@pytest.mark.parametrize(("field", "spoil"), FAULTS, ids=[f"{i}-{field}" for i, (field, _) in enumerate(FAULTS)])
def test_a_faulty_sample_is_refused_by_the_name_of_the_field(field: str, spoil: Callable[[pb.Sample], None]) -> None:
    message = sample_to_proto(make_sample())
    spoil(message)
    with pytest.raises(InvalidArgumentError) as caught:
        sample_from_proto(message)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


def test_a_sample_without_a_generated_token_is_refused() -> None:
    message = sample_to_proto(make_sample())
    del message.turns[:]
    message.turns.add(num_environment_tokens=5, stop_reason=pb.STOP_REASON_STOP)
    with pytest.raises(InvalidArgumentError, match="no generated token"):
        sample_from_proto(message)


def test_counts_that_lie_cost_no_memory() -> None:
    message = sample_to_proto(make_sample())
    message.turns[0].num_generated_tokens = 2**32 - 1
    message.version_spans[0].length = 2**32 - 1
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError):
            sample_from_proto(message)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
