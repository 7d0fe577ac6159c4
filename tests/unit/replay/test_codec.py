from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings

from rollmesh.errors import InvalidArgumentError
from rollmesh.replay.codec import MAGIC, PREFIX, SCHEMA, decode_group, encode_group
from rollmesh.types import Group, PolicyVersion, PromptId, Sample, Score, StopReason, Turn, VersionSpan

GOLDEN = bytes.fromhex(
    "524d470356010000de0013a867726f75705f6964a9747261696e3a303a37a970726f6d70745f696493a5747261696e0007a873657175656e"
    "636503a7617474656d707401aa64617461736f75726365a473756d73aa73616d706c655f69647391ad747261696e3a303a372f302f31a769"
    "6e64657865739100ae70726f6d70745f6c656e677468739102b0726573706f6e73655f6c656e677468739104ad6861735f7265666572656e"
    "636591c3a673636f7265739193cb3ff0000000000000cb3fe000000000000081a6666f726d6174cb3fd0000000000000a96e756d5f747572"
    "6e739102b067656e6572617465645f746f6b656e73920201b2656e7669726f6e6d656e745f746f6b656e73920100ac73746f705f72656173"
    "6f6e7392a473746f70a66c656e677468ac6e756d5f76657273696f6e739102a86c696e6561676573920001a76e756d62657273920405ac73"
    "70616e5f6c656e677468739201020000010000000200000003000000040000000500000006000000000000bf0000c0bf000000c0000080be"
    "000000bf00000000000080c0"
)
GOLDEN_WITHOUT_DATASOURCE = bytes.fromhex(
    "524d470246010000de0012a867726f75705f6964a9747261696e3a303a37a970726f6d70745f696493a5747261696e0007a873657175656e"
    "636503a7617474656d707401aa73616d706c655f69647391ad747261696e3a303a372f302f31a7696e64657865739100ae70726f6d70745f"
    "6c656e677468739102b0726573706f6e73655f6c656e677468739104ad6861735f7265666572656e636591c3a673636f7265739193cb3ff0"
    "000000000000cb3fe000000000000081a6666f726d6174cb3fd0000000000000a96e756d5f7475726e739102b067656e6572617465645f74"
    "6f6b656e73920201b2656e7669726f6e6d656e745f746f6b656e73920100ac73746f705f726561736f6e7392a473746f70a66c656e677468"
    "ac6e756d5f76657273696f6e739102a86c696e6561676573920001a76e756d62657273920405ac7370616e5f6c656e677468739201020000"
    "010000000200000003000000040000000500000006000000000000bf0000c0bf000000c0000080be000000bf00000000000080c0"
)


def golden_group() -> Group:
    """Every field at a value of its own, two turns, two versions."""
    prompt_id = PromptId("train", 0, 7)
    sample = Sample(
        sample_id="train:0:7/0/1",
        index=0,
        prompt_id=prompt_id,
        prompt_token_ids=np.array([1, 2], dtype=np.int32),
        response_token_ids=np.array([3, 4, 5, 6], dtype=np.int32),
        turns=(Turn(2, 1, StopReason.STOP), Turn(1, 0, StopReason.LENGTH)),
        behaviour_logprobs=np.array([-0.5, -1.5, -2.0], dtype=np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, 4), 0, 1), VersionSpan(PolicyVersion(1, 5), 1, 2)),
        score=Score(1.0, 0.5, {"format": 0.25}),
        reference_logprobs=np.array([-0.25, -0.5, 0.0, -4.0], dtype=np.float32),
    )
    return Group("train:0:7", prompt_id, 3, 1, (sample,), "sums")


def assert_equal(left: Group, right: Group) -> None:
    for name in ("group_id", "prompt_id", "sequence", "attempt", "datasource"):
        assert getattr(left, name) == getattr(right, name)
    for a, b in zip(left.samples, right.samples, strict=True):
        for name in ("sample_id", "index", "prompt_id", "turns", "version_spans", "score"):
            assert getattr(a, name) == getattr(b, name)
        for name in ("prompt_token_ids", "response_token_ids", "behaviour_logprobs", "reference_logprobs"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)


def test_stored_groups_are_read_forever() -> None:
    assert_equal(decode_group(GOLDEN), golden_group())
    assert encode_group(golden_group()) == GOLDEN
    assert_equal(decode_group(GOLDEN_WITHOUT_DATASOURCE), replace(golden_group(), datasource=""))


finite = st.floats(-1e6, 1e6, width=32)
tokens = st.integers(0, 2**31 - 1)


@st.composite
def samples(draw: st.DrawFn, prompt_id: PromptId, index: int) -> Sample:
    lengths = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=4))
    runs = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    lengths[-1] = (lengths[-1][0] + max(0, sum(runs) - sum(n for n, _ in lengths)), lengths[-1][1])
    num_generated, num_environment = (sum(column) for column in zip(*lengths, strict=True))
    runs[-1] += num_generated - sum(runs)
    starts = np.cumsum([0, *runs])
    versions = draw(st.lists(st.builds(PolicyVersion, st.integers(0, 9), st.integers(0, 2**40)), min_size=4))
    response = num_generated + num_environment

    def array(values: st.SearchStrategy[Any], length: int, dtype: Any) -> Any:
        return np.array(draw(st.lists(values, min_size=length, max_size=length)), dtype=dtype)

    return Sample(
        sample_id=draw(st.text()),
        index=index,
        prompt_id=prompt_id,
        prompt_token_ids=array(tokens, draw(st.integers(0, 4)), np.int32),
        response_token_ids=array(tokens, response, np.int32),
        turns=tuple(Turn(a, b, draw(st.sampled_from(StopReason))) for a, b in lengths),
        behaviour_logprobs=array(finite, num_generated, np.float32),
        version_spans=tuple(
            VersionSpan(version, int(start), length)
            for version, start, length in zip(versions[: len(runs)], starts[:-1], runs, strict=True)
        ),
        score=draw(st.none() | st.builds(Score, finite, finite, st.dictionaries(st.text(), finite, max_size=2))),
        reference_logprobs=draw(st.none() | st.just(array(finite, response, np.float32))),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    prompt_id = PromptId(draw(st.text()), draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**63)))
    indexes = sorted(draw(st.sets(st.integers(0, 63), min_size=1, max_size=3)))
    return Group(
        draw(st.text()),
        prompt_id,
        draw(st.integers(0, 2**40)),
        draw(st.integers(0, 9)),
        tuple(draw(samples(prompt_id, index)) for index in indexes),
    )


@given(groups())
@settings(max_examples=60, deadline=None)
def test_any_group_survives_the_round_trip(group: Group) -> None:
    assert_equal(decode_group(encode_group(group)), group)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_group_are_refused_in_one_way(payload: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        decode_group(payload)


@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_payload_is_a_group_or_refused_and_nothing_else(position: int, value: int) -> None:
    damaged = GOLDEN[:position] + bytes([value]) + GOLDEN[position + 1 :]
    try:
        group = decode_group(damaged)
    except InvalidArgumentError:
        return
    assert len(group.samples[0].action_mask) == len(group.samples[0].response_token_ids)


def packed(header: object, columns: bytes, magic: bytes = MAGIC, schema: int = SCHEMA) -> bytes:
    """A payload of any header and any columns, as someone else might write it."""
    header_bytes: bytes = msgpack.packb(header)
    return PREFIX.pack(magic, schema, len(header_bytes)) + header_bytes + bytes(-len(header_bytes) % 4) + columns


def unpacked(payload: bytes) -> tuple[dict[str, Any], bytes]:
    length = PREFIX.unpack_from(payload)[2]
    end = PREFIX.size + length
    return msgpack.unpackb(payload[PREFIX.size : end]), payload[end + -end % 4 :]


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda h: h.pop("sequence"), "payload.sequence"),
        (lambda h: h.update(more=1), "payload"),
        (lambda h: h.update(group_id=7), "payload.group_id"),
        (lambda h: h.update(datasource=None), "payload.datasource"),
        (lambda h: h.update(attempt=True), "payload.attempt"),
        (lambda h: h.update(sequence=-1), "payload.sequence"),
        (lambda h: h.update(prompt_id=["train", -1, 0]), "payload.prompt_id"),
        (lambda h: h.update(prompt_id=["train", 0]), "payload.prompt_id"),
        (
            lambda h: h.update({name: [] for name, items in h.items() if name != "prompt_id" and type(items) is list}),
            "payload.sample_ids",
        ),
        (lambda h: h.update(sample_ids=None), "payload.sample_ids"),
        (lambda h: h.update(sample_ids=["a", "b"]), "payload.indexes"),
        (lambda h: h.update(sample_ids=[1]), "payload.sample_ids"),
        (lambda h: h.update(indexes=[-1]), "payload.indexes"),
        (lambda h: h.update(indexes=[0.0]), "payload.indexes"),
        (lambda h: h.update(indexes=[[]]), "payload.indexes"),
        (lambda h: h.update(prompt_lengths=[-2]), "payload.prompt_lengths"),
        (lambda h: h.update(prompt_lengths=[2**62]), "payload"),
        (lambda h: h.update(prompt_lengths=[1]), "payload"),
        (lambda h: h.update(response_lengths=[5]), "samples[0].turns"),
        (lambda h: h.update(num_turns=[1]), "payload.generated_tokens"),
        (
            lambda h: h.update(num_turns=[0], generated_tokens=[], environment_tokens=[], stop_reasons=[]),
            "samples[0].turns",
        ),
        (lambda h: h.update(generated_tokens=[2**62, 0]), "samples[0].turns"),
        (lambda h: h.update(generated_tokens=[5, -1]), "payload.generated_tokens"),
        (lambda h: h.update(stop_reasons=["stop", "why not"]), "samples[0].turns"),
        (lambda h: h.update(stop_reasons=["stop", ["stop"]]), "payload.stop_reasons"),
        (lambda h: h.update(num_versions=[0], lineages=[], numbers=[], span_lengths=[]), "samples[0].versions"),
        (lambda h: h.update(span_lengths=[1, 1]), "samples[0].versions"),
        (lambda h: h.update(span_lengths=[3, 0]), "samples[0].versions"),
        (lambda h: h.update(lineages=[0, -1]), "payload.lineages"),
        (lambda h: h.update(numbers=[4]), "payload.numbers"),
        (lambda h: h.update(scores=[[1.0, float("inf"), {}]]), "samples[0].score"),
        (lambda h: h.update(scores=[[1.0, 1.0, {"a": "b"}]]), "samples[0].score"),
        (lambda h: h.update(scores=[[1.0, 1.0, {"a": float("nan")}]]), "samples[0].score"),
        (lambda h: h.update(scores=[[1.0, 1.0]]), "samples[0].score"),
        (lambda h: h.update(scores=[1.0]), "samples[0].score"),
        (lambda h: h.update(has_reference=[False]), "payload"),
        (lambda h: h.update(has_reference=[1]), "payload.has_reference"),
    ],
)
def test_hostile_headers_are_refused_by_the_name_of_their_field(edit: Edit, field: str) -> None:
    header, columns = unpacked(GOLDEN)
    edit(header)
    with pytest.raises(InvalidArgumentError) as caught:
        decode_group(packed(header, columns))
    assert caught.value.field == field


def test_two_samples_of_one_index_are_refused() -> None:
    header, columns = unpacked(GOLDEN)
    twice = {
        name: items * 2 if type(items) is list and name != "prompt_id" else items for name, items in header.items()
    }
    with pytest.raises(InvalidArgumentError) as caught:
        decode_group(packed(twice, columns * 2))
    assert caught.value.field == "samples"


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        (0, np.array(-1, "<i4"), "samples[0].prompt"),
        (9, np.array(-(2**31), "<i4"), "samples[1].response"),
        (14, np.array(np.nan, "<f4"), "samples[0].logprobs"),
        (17, np.array(-np.inf, "<f4"), "samples[1].logprobs"),
        (19, np.array(np.inf, "<f4"), "samples[1].reference"),
    ],
)
def test_a_number_that_is_none_is_refused_by_the_sample_it_is_in(place: int, value: Any, field: str) -> None:
    """The columns: 2 + 2 prompt tokens, 4 + 4 response tokens, 3 + 3 log-probs, then the reference of the second."""
    first = golden_group().samples[0]
    without = Sample(**{**vars(first), "reference_logprobs": None})
    second = Sample(**{**vars(first), "index": 1})
    group = golden_group()
    header, columns = unpacked(encode_group(Group("g", group.prompt_id, 0, 0, (without, second))))
    with pytest.raises(InvalidArgumentError) as caught:
        decode_group(packed(header, columns[: 4 * place] + value.tobytes() + columns[4 * place + 4 :]))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"", "payload"),
        (b"RMG", "payload"),
        (packed({}, b"", magic=b"GMR"), "payload"),
        (packed({}, b"", schema=SCHEMA + 1), "payload.schema"),
        (packed({}, b"", schema=1), "payload.schema"),
        (packed([], b""), "payload"),
        (packed({1: 2}, b""), "payload"),
        (PREFIX.pack(MAGIC, SCHEMA, 2**32 - 1), "payload"),
        (GOLDEN[:-1], "payload"),
        (GOLDEN[:-4], "payload"),
        (GOLDEN + bytes(4), "payload"),
    ],
)
def test_what_is_not_of_the_form_is_refused(payload: bytes, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode_group(payload)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_id": PromptId("train", 0, 8)}, "samples[0]"),
        ({"index": -1}, "payload.indexes"),
        ({"turns": ()}, "samples[0].logprobs"),
        ({"turns": (Turn(3, 0, StopReason.STOP),)}, "samples[0].turns"),
        ({"version_spans": ()}, "samples[0].versions"),
        ({"version_spans": (VersionSpan(PolicyVersion(0, 4), 1, 3),)}, "samples[0].versions"),
        ({"version_spans": (VersionSpan(PolicyVersion(0, 4), 0, 4),)}, "samples[0].versions"),
        ({"behaviour_logprobs": np.array([0, -np.inf, 0], dtype=np.float32)}, "samples[0].logprobs"),
        ({"behaviour_logprobs": np.array([0, 1e300, 0])}, "samples[0].logprobs"),
        ({"behaviour_logprobs": np.zeros(4, np.float32)}, "samples[0].logprobs"),
        ({"reference_logprobs": np.zeros(3, np.float32)}, "samples[0].reference"),
        ({"reference_logprobs": np.zeros((4, 2), np.float32)}, "samples[0].reference"),
        ({"response_token_ids": np.array([3, 4, -5, 6], np.int32)}, "samples[0].response"),
        ({"prompt_token_ids": np.zeros((2, 2), np.int32)}, "samples[0].prompt"),
        ({"score": Score(float("nan"), 0.0)}, "samples[0].score"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_cannot_be_read_back_is_not_stored(change: dict[str, Any], field: str) -> None:
    group = golden_group()
    sample = Sample(**{**vars(group.samples[0]), **change})
    with pytest.raises(InvalidArgumentError) as caught:
        encode_group(Group(group.group_id, group.prompt_id, 0, 0, (sample,)))
    assert caught.value.field == field


def test_a_group_without_samples_is_not_stored() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        encode_group(Group("g", PromptId("train", 0, 8), 0, 0, ()))
    assert caught.value.field == "samples"


def test_arrays_are_views_of_the_payload() -> None:
    payload = encode_group(golden_group())
    bytes_of_it = np.frombuffer(payload, np.uint8)
    sample = decode_group(payload).samples[0]
    for array in (
        sample.prompt_token_ids,
        sample.response_token_ids,
        sample.behaviour_logprobs,
        sample.reference_logprobs,
    ):
        assert array is not None
        assert np.shares_memory(array, bytes_of_it)
        assert array.flags.aligned
        assert not array.flags.writeable


def test_versions_are_stored_as_runs() -> None:
    def packed_size(num_tokens: int) -> int:
        sample = Sample(
            "s",
            0,
            PromptId("d", 0, 0),
            np.zeros(0, np.int32),
            np.zeros(num_tokens, np.int32),
            (Turn(num_tokens, 0, StopReason.STOP),),
            np.zeros(num_tokens, np.float32),
            (VersionSpan(PolicyVersion(0, 0), 0, num_tokens),),
        )
        return len(encode_group(Group("g", PromptId("d", 0, 0), 0, 0, (sample,))))

    assert packed_size(2000) - packed_size(1000) == 8 * 1000
