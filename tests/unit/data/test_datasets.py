"""Every way in which a dataset can be read, and every way in which it can be wrong."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollmesh.config import DataSection
from rollmesh.data.datasets import PromptDataset, open_dataset
from rollmesh.errors import ConfigError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def opened(path: Path, **settings: Any) -> PromptDataset:
    return open_dataset(DataSection(path=path, **settings), "train")


def test_json_lines_are_read_with_labels_of_any_type(tmp_path: Path) -> None:
    labels = ["text", 7, 2.5, None, ["a", 1], {"tests": [1, 2]}]
    path = write_lines(tmp_path / "d.jsonl", *({"input": f"p{i}", "label": label} for i, label in enumerate(labels)))
    dataset = opened(path, label_key="label")
    assert len(dataset) == 6
    assert [dataset.row(i).label for i in range(6)] == labels
    assert dataset.row(3).label_json == "null"
    assert dataset.row(0).prompt_json == '"p0"'


def test_a_dataset_without_labels_has_empty_label_texts(tmp_path: Path) -> None:
    row = opened(write_lines(tmp_path / "d.jsonl", {"input": "p", "datasource": "maths"})).row(0)
    assert (row.label_json, row.datasource) == ("", "maths")


def test_the_datasource_is_default_where_there_is_none(tmp_path: Path) -> None:
    assert opened(write_lines(tmp_path / "d.jsonl", {"input": "p"})).row(0).datasource == "default"


def test_chat_prompts_stay_lists_of_messages(tmp_path: Path) -> None:
    assert opened(write_lines(tmp_path / "d.jsonl", {"input": CHAT})).row(0).prompt == CHAT


def test_blank_lines_are_passed_over_and_lines_still_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"input": "p"}, "", "{oops")
    with pytest.raises(ConfigError, match=r"d\.jsonl, line 3: is not JSON"):
        opened(path)


def test_only_the_first_rows_are_used_where_a_number_is_set(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"input": "a"}, {"input": "b"}, "never read")
    assert len(opened(path, max_samples=2)) == 2


def test_parquet_has_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    rows = [{"input": "a", "label": {"answer": [1, 2]}}, {"input": "b", "label": {"answer": []}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    parquet = opened(tmp_path / "d.parquet", label_key="label")
    lines = opened(write_lines(tmp_path / "d.jsonl", *rows), label_key="label")
    assert [parquet.row(i) for i in range(2)] == [lines.row(i) for i in range(2)]
    assert len(opened(tmp_path / "d.parquet", max_samples=1)) == 1


def test_fields_that_arrow_filled_with_null_are_taken_out_of_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x", "name": "search"}]
    pq.write_table(pa.Table.from_pylist([{"input": chat}]), tmp_path / "d.parquet")
    assert opened(tmp_path / "d.parquet").row(0).prompt == chat


def test_arrow_values_become_json(tmp_path: Path) -> None:
    labels = pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5)])
    pq.write_table(pa.table({"input": ["p"], "label": labels}), tmp_path / "d.parquet")
    assert opened(tmp_path / "d.parquet", label_key="label").row(0).label_json == '"2026-01-02T03:04:05"'


def test_saved_folders_of_the_datasets_library_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input": f"p{i}", "label": i} for i in range(10)])
    rows.shuffle(seed=1).save_to_disk(tmp_path / "single", num_shards=3)
    single = opened(tmp_path / "single", label_key="label")
    assert sorted(single.row(i).label for i in range(10)) == list(range(10))
    datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "splits")
    assert len(opened(tmp_path / "splits")) == 10
    assert len(opened(tmp_path / "splits", split="test")) == 2
    with pytest.raises(ConfigError, match=r"data\.split: 'dev' is not a split .* test, train"):
        opened(tmp_path / "splits", split="dev")


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, r"data\.path: .* has no rows"),
        (["[1]"], {}, r"line 1: holds a list; write one JSON object per line"),
        (
            [{"input": "a"}, {"prompt": "b", "x": 1}],
            {},
            r"line 2: has no key 'input'; its keys are prompt, x; set data",
        ),
        ([{"input": "a"}], {"label_key": "gold"}, r"line 1: has no key 'gold'; .*set data\.label_key"),
        ([{"input": 5}], {}, r"line 1, input: is a number; prompts are text"),
        ([{"input": "  "}], {}, r"line 1, input: is empty"),
        ([{"input": []}], {}, r"line 1, input: is a list; prompts are text"),
        ([{"input": [{"role": "user"}]}], {}, r"lists of messages with a role and a content"),
        (['{"input": "a", "label": NaN}'], {"label_key": "label"}, r"line 1, label: nan is not a JSON number"),
    ],
)
def test_a_fault_in_a_file_is_one_sentence_with_its_place(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(write_lines(tmp_path / "d.jsonl", *rows), **settings)


def test_files_that_are_missing_unknown_or_broken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: .*absent\.jsonl does not exist"):
        opened(tmp_path / "absent.jsonl")
    (tmp_path / "d.csv").write_text("input\na\n")
    with pytest.raises(ConfigError, match=r"is of an unknown kind; use a \.jsonl or \.parquet file"):
        opened(tmp_path / "d.csv")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match="is not a Parquet file"):
        opened(tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"holds neither Parquet files nor what `datasets\.save_to_disk` writes"):
        opened(tmp_path / "folder")
    (tmp_path / "folder" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"was not written by `datasets\.save_to_disk`"):
        opened(tmp_path / "folder")


def test_columns_and_cells_that_a_table_lacks_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a", None]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"data\.input_key: 'input' is not a column .* has question"):
        opened(tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"d\.parquet, row 2, question: is null"):
        opened(tmp_path / "d.parquet", input_key="question").check_rows(10.0)


def test_the_place_of_another_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.data\.path"):
        open_dataset(DataSection(path=tmp_path / "absent.jsonl"), "eval", "evaluation.data")


def test_reading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input": ["p"]}), tmp_path / "d.parquet")
    program = (
        "import sys; from pathlib import Path; import services.coordinator.main\n"
        "from rollmesh.config import DataSection; from rollmesh.data.datasets import open_dataset\n"
        f"open_dataset(DataSection(path=Path({str(tmp_path / 'd.parquet')!r})), 'train').row(0)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"
