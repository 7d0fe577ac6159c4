"""Bytes written by the first release read the same in every later one."""

from __future__ import annotations

import pytest
from google.protobuf import json_format

from rollmesh.wire.trajectory import sample_from_proto, sample_to_proto
from tests.contract.examples import SAMPLE
from tests.contract.golden import as_fields, load, message_types

_GOLDEN = load()

# The array columns, spelled out: token ids and log-probabilities are little-endian, four bytes each.
_SAMPLE_BYTES = bytes.fromhex(
    "0a0e747261696e3a333a31372f352f31" "1005" "1a0b0a05747261696e10031811"
    "220c0b0000000c0000000d000000"
    "2a1c15000000160000001700000018000000190000001a0000001b000000"
    "3206080310021803" "3206080110011802"
    "3a10000000bf000080be0000c0bf000000c0"
    "42080a04080110291801" "420a0a040802102a10011803"
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(_GOLDEN))
def test_golden_bytes_decode_to_their_fields(name: str) -> None:
    message = message_types()[name].FromString(bytes.fromhex(_GOLDEN[name]["bytes"]))
    assert as_fields(message) == _GOLDEN[name]["fields"]


@pytest.mark.parametrize("name", sorted(_GOLDEN))
def test_the_fields_are_still_written_to_the_golden_bytes(name: str) -> None:
    message = json_format.ParseDict(_GOLDEN[name]["fields"], message_types()[name]())
    assert message.SerializeToString(deterministic=True).hex() == _GOLDEN[name]["bytes"]


def test_every_message_has_golden_bytes() -> None:
    missing = set(message_types()) - set(_GOLDEN)
    assert not missing, "run `python -m tests.contract.golden` and commit golden.json"


def test_a_sample_has_exactly_these_bytes() -> None:
    assert sample_to_proto(SAMPLE).SerializeToString(deterministic=True) == _SAMPLE_BYTES


def test_a_sample_reads_back_from_exactly_these_bytes() -> None:
    message = sample_to_proto(SAMPLE)
    message.ParseFromString(_SAMPLE_BYTES)
    sample = sample_from_proto(message)
    assert sample.response_token_ids.tolist() == [21, 22, 23, 24, 25, 26, 27]
    assert sample.behaviour_logprobs.tolist() == [-0.5, -0.25, -1.5, -2.0]
    assert sample.version_spans == SAMPLE.version_spans
