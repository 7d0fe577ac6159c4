"""Files as people have them: those that can be understood are read, the others are one sentence with place and fix."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollmesh.config import DataSection
from rollmesh.data.datasets import PromptDataset, open_dataset
from rollmesh.errors import ConfigError

LINE = b'{"input": "a", "label": 1}\n'


def opened(path: Path, **settings: Any) -> PromptDataset:
    return open_dataset(DataSection(path=path, **settings), "train")


def fault(path: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_table(path: Path, *prompts: str | None, **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"input": list(prompts), **columns}), path)
    return path


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (LINE + b'{"input": "cut', "line 2: is not JSON (Unterminated string starting at at column 11); write one"),
        (
            LINE + b'{"input": "x", "label": ' + b"9" * 5000 + b"}",
            "line 2: cannot be used (Exceeds the limit (4300 digits",
        ),
        (LINE + b'{"input": "x", "label": ' + b"[" * 9000 + b"]" * 9000 + b"}", "line 2: is nested too deeply"),
        (LINE + b'{"input": "x", "input": "y"}', "line 2: cannot be used (the key 'input' stands twice in one object)"),
        (LINE + b'{"input": "caf\xe9"}', "line 2: is not UTF-8 (byte 0xe9 at column 15); save the file as UTF-8"),
        (LINE.decode().encode("utf-16"), "line 1: is not UTF-8"),
        (gzip.compress(LINE, mtime=0), "line 1: is compressed by gzip; unpack the file"),
        (b'[\n{"input": "a"}\n]\n', "line 1: begins a JSON array; write one JSON object per line"),
        (b"\xef\xbb\xbf", "has no rows"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    assert problem in fault(path)


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "d.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") * 2)
    assert len(opened(path)) == 2


def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(LINE))
    assert "d.jsonl.gz is of an unknown kind; unpack it" in fault(tmp_path / "d.jsonl.gz")
    assert "/dev/null is not a file" in fault(Path("/dev/null"))
    assert "does not exist" in fault(tmp_path / "absent.jsonl")


def test_a_folder_of_parquet_files_is_one_dataset(tmp_path: Path) -> None:
    write_table(tmp_path / "part-00001.parquet", "c", label=[3])
    write_table(tmp_path / "part-00000.parquet", "a", "b", label=[1, 2])
    (tmp_path / "_SUCCESS").touch()
    dataset = opened(tmp_path, label_key="label")
    assert [(dataset.row(i).prompt, dataset.row(i).label) for i in range(3)] == [("a", 1), ("b", 2), ("c", 3)]
    assert len(opened(tmp_path, max_samples=2)) == 2


def test_the_splits_of_a_folder_of_parquet_files_are_kept_apart(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_table(tmp_path / f"{name}.parquet", name)
    dataset = opened(tmp_path)
    assert [dataset.row(i).prompt for i in range(len(dataset))] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert len(opened(tmp_path, split="test")) == 1
    assert "data.split: 'dev' is not a split of" in fault(tmp_path, split="dev")


def test_tables_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"])] * 3, names=["input", "input", "other"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "twice.parquet has the column 'input' 2 times; rename one" in fault(tmp_path / "twice.parquet")
    whole = write_table(tmp_path / "whole.parquet", *map(str, range(5000))).read_bytes()
    for kept in (0, 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:kept])
        assert "cut.parquet is not a Parquet file that can be read (" in fault(tmp_path / "cut.parquet")
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_table(folder / "a.parquet", "a", label=[1])
    write_table(folder / "b.parquet", "b", label=["text"])
    assert "do not have the same columns" in fault(folder, label_key="label")
    write_table(folder / "b.parquet", "b")
    assert "data.label_key: 'label' is not a column of" in fault(folder, label_key="label")


def test_a_column_that_is_not_used_is_not_read(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["input", "other", "other"])
    pq.write_table(table, tmp_path / "d.parquet")
    assert opened(tmp_path / "d.parquet").row(0).prompt == "a"


def test_bytes_that_are_no_file_of_their_kind_are_never_a_traceback(tmp_path: Path) -> None:
    contents = [b"", b"\0", b"\xff" * 100, b"{", b"null\n", b"1\n", b'"a"\n', json.dumps([1]).encode()]
    for number, content in enumerate(contents):
        for suffix in (".jsonl", ".parquet"):
            path = tmp_path / f"{number}{suffix}"
            path.write_bytes(content)
            assert str(path) in fault(path)
