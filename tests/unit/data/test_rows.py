"""One rule for every row, before the run and when the row is leased: what passes can be sent to every service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.config import DataSection
from rollmesh.data.datasets import PromptDataset, open_dataset
from rollmesh.data.rows import Cells, read_row
from rollmesh.errors import ConfigError
from rollmesh.v1 import coordinator_pb2
from rollmesh.wire.limits import MAX_TEXT_BYTES

FINE = {"input": "fine", "label": "1"}


def opened(path: Path, **settings: Any) -> PromptDataset:
    return open_dataset(DataSection(path=path, label_key="label", **settings), "train")


def with_second_row(tmp_path: Path, row: Any) -> PromptDataset:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(FINE)}\n\n{json.dumps(row)}\n{json.dumps(FINE)}\n")
    return opened(path)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"input": "half \ud83d", "label": "1"},
            r"d.jsonl, line 3, input: has half of a character ('\ud83d', a surrog",
        ),
        ({"input": [{"role": "user", "content": "\udc00"}], "label": "1"}, "line 3, input: has half of a character"),
        ({"input": [{"role": "user", "content": "x", "\udc00": 1}], "label": ""}, "line 3, input: has half"),
        ({"input": "x", "label": {"a": ["\ud83d"]}}, "line 3, label: has half of a character"),
        ({"input": "x", "label": "1", "datasource": "\ud83d"}, "line 3, datasource: has half of a character"),
        ({"input": "x", "label": "1", "datasource": ["a"]}, "line 3, datasource: is a list; name"),
        ({"input": "x", "label": "1", "datasource": "a\0b"}, "line 3, datasource: 'a\\x00b' has a character that"),
        ({"input": "x", "label": "1", "datasource": "a" * 1025}, "datasource: has 1,025 bytes, and at most 1,024 can"),
        ({"input": "x", "label": "1" * MAX_TEXT_BYTES}, "line 3, label: has 16,777,218 bytes, and at most 16,777,216"),
        ({"input": "é" * (MAX_TEXT_BYTES // 2), "label": ""}, "line 3, input: has 16,777,218 bytes"),
        ({"input": "x", "label": nested(101)}, "line 3, label: is nested more than 100 levels deep"),
        ({"input": None, "label": ""}, "line 3, input: is null; prompts are text"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_line_and_column_before_the_run_and_when_it_is_leased(
    tmp_path: Path, row: Any, fault: str
) -> None:
    dataset = with_second_row(tmp_path, row)
    with pytest.raises(ConfigError) as before:
        dataset.check_rows(60.0)
    with pytest.raises(ConfigError) as leased:
        dataset.row(1)
    assert str(before.value) == str(leased.value)
    assert fault in str(leased.value)
    assert dataset.row(0).prompt == dataset.row(2).prompt == "fine"


def test_an_arrow_cell_that_is_no_text_is_named(tmp_path: Path) -> None:
    raw = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")]
    )
    pq.write_table(pa.table({"input": raw, "label": ["", ""]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"d\.parquet, row 2, input: cannot be read \("):
        opened(tmp_path / "d.parquet").check_rows(10.0)


def test_judging_the_rows_ends_in_time_and_says_how_far_it_came(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text((json.dumps(FINE) + "\n") * 1000)
    assert opened(path).check_rows(0.0) == 1
    assert opened(path).check_rows(60.0) == 1000


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": JSON_VALUES}), max_size=3
)


@given(prompt=JSON_VALUES | MESSAGES, label=JSON_VALUES, datasource=JSON_VALUES)
def test_every_row_that_passes_can_be_sent_and_read_again(prompt: Any, label: Any, datasource: Any) -> None:
    try:
        row = read_row(Cells("d.jsonl, line 1", prompt, label, True, datasource, "input", "label", "datasource"))
    except ConfigError:
        return
    message = coordinator_pb2.LeaseResponse(
        prompt_json=row.prompt_json, label_json=row.label_json, datasource=row.datasource
    )
    received = coordinator_pb2.LeaseResponse.FromString(message.SerializeToString())
    assert json.loads(received.prompt_json) == row.prompt
    assert json.loads(received.label_json) == row.label
    assert received.datasource == row.datasource
