"""An exception that is none of ours is one sentence with its type, its message and the place in our code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollmesh.telemetry.crash import describe_crash, full_disk
from rollmesh.types import PolicyVersion


def _caught(text: str) -> BaseException:
    with pytest.raises(Exception) as caught:
        PolicyVersion.parse(text) if text else json.loads("{")
    return caught.value


def test_the_place_is_the_innermost_line_of_our_own_code() -> None:
    sentence = describe_crash(_caught("a.b"))
    assert sentence.startswith("ValueError: ")
    assert "(at rollmesh/types.py:" in sentence
    assert sentence.endswith(", in parse)")


def test_a_place_outside_our_code_is_named_where_there_is_no_other() -> None:
    assert "/json/decoder.py:" in describe_crash(_caught(""))


def test_a_message_of_many_lines_becomes_one_line_of_bounded_length() -> None:
    sentence = describe_crash(RuntimeError("first\n  second\n" + "x" * 10_000))
    assert sentence.startswith("RuntimeError: first second xxx")
    assert "\n" not in sentence
    assert len(sentence) < 600


def test_a_group_of_exceptions_is_described_by_its_first_one() -> None:
    group = ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("inner", [KeyError("reward")])])
    assert describe_crash(group) == "KeyError: 'reward'"


def test_a_disk_with_space_is_not_mentioned(tmp_path: Path) -> None:
    assert full_disk(tmp_path) == ""
    assert full_disk(tmp_path / "absent") == ""
