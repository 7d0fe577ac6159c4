"""A field that the codec forgets, on either side, fails a test here."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

import rollmesh.wire
from rollmesh import types
from tests.contract.examples import ABSENT, CODECS, ENUM_TABLES, Codec
from tests.contract.golden import FILES

_WITHOUT_CODEC = {
    # `rollmesh.rpc.status_codes` reads and writes it.
    "ErrorDetail",
    # No service of the mesh speaks it yet.
    "RunEpisodesRequest",
    "EpisodeReset",
    "EpisodeStep",
    "EpisodeClose",
    "RunEpisodesResponse",
    "Observation",
}


def _all_codecs() -> Iterator[tuple[Codec, Any]]:
    for codec in CODECS:
        for example in (codec.example, *codec.options):
            yield codec, example


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, tuple):
        return isinstance(right, tuple) and len(left) == len(right) and all(map(_same, left, right))
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            _same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    return bool(left == right)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _unset_fields(message: Any, path: str) -> Iterator[str]:
    """Paths of the fields that have their default, oneofs counted once."""
    for field in message.DESCRIPTOR.fields:
        where, value = f"{path}.{field.name}", getattr(message, field.name)
        if field.containing_oneof is not None and message.WhichOneof(field.containing_oneof.name) != field.name:
            continue
        if field.is_repeated:
            if not value:
                yield where
            elif field.message_type is not None and not _is_map(field):
                for i, item in enumerate(value):
                    # In a list a single zero is no sign of a forgotten field: the last item has to be full.
                    if i == len(value) - 1:
                        yield from _unset_fields(item, f"{where}[{i}]")
        elif field.message_type is not None:
            if message.HasField(field.name):
                yield from _unset_fields(value, where)
            else:
                yield where
        elif value == field.default_value:
            yield where
    for oneof in message.DESCRIPTOR.oneofs:
        if message.WhichOneof(oneof.name) is None:
            yield f"{path}.{oneof.name}"


def _counterpart(domain: Any, field_name: str, arguments: Mapping[str, Any]) -> Any:
    """The dataclass field, or the argument of the writer, that a message field stands for."""
    candidates = [field_name, f"is_{field_name}", field_name.removesuffix("_ms") + "_s"]
    for candidate in candidates:
        if candidate in arguments:
            return arguments[candidate]
    for owner in (domain, getattr(domain, "caller", None), getattr(domain, "report", None)):
        for candidate in candidates:
            if hasattr(owner, candidate):
                return getattr(owner, candidate)
    raise AssertionError(f"{type(domain).__name__} has nothing for {field_name!r}")


def _assert_same_fields(domain: Any, message: Any, arguments: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Every field of the message has the value of the field or argument with its name: no two are swapped."""
    for field in message.DESCRIPTOR.fields:
        value, expected = getattr(message, field.name), _counterpart(domain, field.name, arguments)
        if field.name.endswith("_ms"):
            assert value == round(expected * 1000), field.name
        elif isinstance(expected, np.ndarray):
            assert value == expected.tobytes(), field.name
        elif isinstance(expected, enum.Enum):
            assert field.enum_type.values_by_number[value].name.endswith(f"_{expected.name}"), field.name
        elif _is_map(field):
            assert dict(value) == dict(expected), field.name
        elif field.is_repeated and field.message_type is not None:
            for item, expected_item in zip(value, expected, strict=True):
                _assert_same_fields(expected_item, item)
        elif field.is_repeated:
            assert tuple(value) == tuple(expected), field.name
        elif field.message_type is not None:
            _assert_same_fields(expected, value)
        elif isinstance(expected, float):
            assert value == pytest.approx(expected, rel=1e-6), field.name
        else:
            assert value == expected, field.name


_IDS = [f"{codec.name}-{type(example).__name__}" for codec, example in _all_codecs()]


@pytest.mark.parametrize(("codec", "example"), _all_codecs(), ids=_IDS)
def test_every_example_reads_back_as_it_was_written(codec: Codec, example: Any) -> None:
    message = codec.to_proto(example)
    assert _same(codec.from_proto(type(message).FromString(message.SerializeToString())), example)


@pytest.mark.parametrize(("codec", "example"), _all_codecs(), ids=_IDS)
def test_every_field_of_a_message_is_written(codec: Codec, example: Any) -> None:
    message = codec.to_proto(example)
    assert list(_unset_fields(message, message.DESCRIPTOR.name)) == []


# Messages that only wrap one noun, and those with a oneof, have no fields of the noun's names.
_WRAPPERS = ("receive", "commit", "begin_publish_answer", "prepare_answer", "<lambda>")
_BY_NAME = [codec for codec in CODECS if codec.name not in _WRAPPERS]


@pytest.mark.parametrize("codec", _BY_NAME, ids=lambda codec: codec.name)
def test_a_field_is_written_under_its_own_name(codec: Codec) -> None:
    _assert_same_fields(codec.example, codec.to_proto(codec.example), codec.arguments)


@pytest.mark.parametrize("codec", ABSENT, ids=lambda codec: codec.name)
def test_none_is_an_absent_message(codec: Codec) -> None:
    message = codec.to_proto(codec.example)
    assert codec.from_proto(type(message).FromString(message.SerializeToString())) == codec.example


def _messages_in(descriptor: Descriptor, found: set[str]) -> None:
    if descriptor.name in found or descriptor.GetOptions().map_entry:
        return
    found.add(descriptor.name)
    for field in descriptor.fields:
        if field.message_type is not None:
            _messages_in(field.message_type, found)


def test_every_message_of_the_contract_has_a_codec() -> None:
    covered: set[str] = set()
    for codec, example in _all_codecs():
        _messages_in(codec.to_proto(example).DESCRIPTOR, covered)
    declared = {name: d for file in FILES for name, d in file.DESCRIPTOR.message_types_by_name.items()}
    without_fields = {name for name, descriptor in declared.items() if not descriptor.fields}
    assert set(declared) - covered - without_fields == _WITHOUT_CODEC - without_fields


def test_every_alternative_of_a_oneof_has_an_example() -> None:
    wanted: set[tuple[str, str]] = set()
    seen: set[tuple[str, str]] = set()
    for codec, example in _all_codecs():
        message = codec.to_proto(example)
        for oneof in message.DESCRIPTOR.oneofs:
            wanted |= {(message.DESCRIPTOR.name, field.name) for field in oneof.fields}
            seen.add((message.DESCRIPTOR.name, message.WhichOneof(oneof.name)))
    assert seen == wanted
    assert len(wanted) == 9


def test_every_writer_of_the_codec_has_an_example() -> None:
    writers = set()
    for module in pkgutil.iter_modules(rollmesh.wire.__path__, "rollmesh.wire."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_to_proto") and not name.startswith("_") and value.__module__ == module.name:
                writers.add(name)
    exampled = {codec.writer for codec in CODECS}
    assert writers - exampled == {"version_to_proto", "outcome_to_proto", "logprobs_to_proto"}


@pytest.mark.parametrize("name", ENUM_TABLES)
def test_every_enumeration_has_the_members_of_its_counterpart(name: str) -> None:
    members, table = ENUM_TABLES[name]
    wire = next(f.DESCRIPTOR.enum_types_by_name[name] for f in FILES if name in f.DESCRIPTOR.enum_types_by_name)
    numbers = {value.number for value in wire.values} - {0}
    assert {table.to_proto(member) for member in members} == numbers
    assert {table.from_proto(number, "field") for number in numbers} == set(members)


def test_every_enumeration_of_the_contract_has_a_table() -> None:
    declared = {name for file in FILES for name in file.DESCRIPTOR.enum_types_by_name}
    assert declared == {*ENUM_TABLES, "ErrorReason"}


def test_examples_have_no_default_values() -> None:
    """The guard of the guards: a zero in an example would hide a forgotten field."""

    def check(value: Any, where: str) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                # Answers to a sample, not part of its trajectory.
                if not (isinstance(value, types.Sample) and field.name in ("score", "reference_logprobs")):
                    check(getattr(value, field.name), f"{where}.{field.name}")
        elif isinstance(value, np.ndarray):
            assert value.all(), where
        elif isinstance(value, tuple):
            assert value, where
            if dataclasses.is_dataclass(value[-1]):
                check(value[-1], f"{where}[-1]")
        elif value is not None or where != "begin_publish_answer":  # there None is an answer of its own
            assert value, where

    for codec, example in _all_codecs():
        check(example, codec.name)
