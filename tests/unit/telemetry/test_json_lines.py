"""A file of JSON lines survives whoever is killed while writing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from rollmesh.telemetry.json_lines import JsonLines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "metrics.jsonl"


def test_what_was_appended_is_read_in_order(path: Path) -> None:
    lines = JsonLines(path)
    assert lines.read() == []
    for step in (1, 2):
        lines.append({"step": step})
    assert lines.read() == JsonLines(path).read() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("rest", ['{"step": 3', '{"step": 3, "loss": 0.', "\x00\x00\x00", '{"a'], ids=repr)
def test_a_last_line_that_was_cut_is_skipped_and_the_next_append_removes_it(path: Path, rest: str) -> None:
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2}\n' + rest, encoding="utf-8")
    lines = JsonLines(path)
    assert lines.read() == [{"step": 1}, {"step": 2}]
    lines.append({"step": 3})
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_whole_last_line_without_its_end_is_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    lines = JsonLines(path)
    lines.append({"step": 3})
    assert lines.read() == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_damaged_line_before_the_last_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"step": 1}\nnothing\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is no JSON object .*; remove that line"):
        JsonLines(path).read()


def test_what_is_not_kept_is_gone_and_nothing_else_changes(path: Path) -> None:
    lines = JsonLines(path)
    lines.keep(lambda entry: True)
    assert not path.exists()
    for step in range(5):
        lines.append({"step": step, "word": "über"})
    lines.keep(lambda entry: entry["step"] < 3)
    assert [entry["step"] for entry in lines.read()] == [0, 1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_number_that_json_does_not_know_is_refused_before_anything_is_written(path: Path) -> None:
    lines = JsonLines(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.append({"loss": float("nan")})
    assert lines.read() == []
