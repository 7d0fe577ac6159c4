"""Prompt datasets: JSON Lines, Parquet, and folders written by `datasets.save_to_disk`.

::

    file ── columns ──► _Columns (three lists or Arrow columns) ──► PromptDataset ── row(i) ──► PromptRow (plain JSON)

Everything that can be wrong with the file as a whole is found when it is opened, before anything else starts; an
Arrow file's cells become Python values only when their row is asked for. Nothing here imports torch or `datasets`:
both formats of the latter are read with pyarrow alone.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollmesh.config import DataSection
from rollmesh.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_DATASOURCE = "default"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row.

    Attributes:
        prompt: text, or a non-empty list of chat messages (mappings with ``role`` and ``content``).
        label: any JSON value; None where the dataset has no label.
        has_label: tells a label that is ``null`` from no label at all.
        datasource: name that metrics are grouped by.
    """

    prompt: str | list[dict[str, Any]]
    label: Any
    has_label: bool
    datasource: str

    @property
    def prompt_json(self) -> str:
        return json.dumps(self.prompt, ensure_ascii=False)

    @property
    def label_json(self) -> str:
        """Empty where there is no label."""
        return json.dumps(self.label, ensure_ascii=False) if self.has_label else ""


@dataclass(frozen=True, slots=True)
class _Columns:
    """The cells that are used, by row; None for a column that was not asked for or is not there."""

    prompts: Sequence[Any]
    labels: Sequence[Any] | None
    datasources: Sequence[Any] | None


class PromptDataset:
    """Rows that are asked for by index; made by `open_dataset`."""

    def __init__(self, name: str, source: str, input_key: str, columns: _Columns) -> None:
        self.name = name
        self._source = source
        self._input_key = input_key
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns.prompts)

    def row(self, index: int) -> PromptRow:
        """Row ``index`` of the file, from 0.

        Raises:
            IndexError: there is no such row.
            ConfigError: a cell cannot be used; the message names file, row and column.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} lies outside the {len(self)} rows of {self._source}")
        columns, place = self._columns, f"{self._source}, row {index + 1}"
        label = None if columns.labels is None else _as_json(columns.labels[index], f"{place}, label")
        datasource = DEFAULT_DATASOURCE if columns.datasources is None else columns.datasources[index]
        return PromptRow(
            prompt=_as_prompt(_python(columns.prompts[index]), place, self._input_key),
            label=label,
            has_label=columns.labels is not None,
            datasource=str(_python(datasource) or DEFAULT_DATASOURCE),
        )


def open_dataset(section: DataSection, name: str, place: str = "data") -> PromptDataset:
    """Open the dataset that a section of the mesh file names.

    Args:
        section: which file, and which of its columns.
        name: what prompt ids call it, e.g. "train".
        place: dotted path of the section, for messages.

    Raises:
        ConfigError: the file is missing, empty, of an unknown kind, broken, or lacks a column or cell.
    """
    path = section.path
    if not path.exists():
        raise ConfigError(f"{place}.path", f"{path} does not exist", "name a JSONL or Parquet file or a dataset folder")
    if path.is_dir():
        columns = _from_table(_read_folder(section, place), section, place)
    elif path.suffix == ".parquet":
        columns = _from_table(_read_parquet(path, place), section, place)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        columns = _read_json_lines(section, place)
    else:
        raise ConfigError(f"{place}.path", f"{path} is of an unknown kind", "use a .jsonl or .parquet file")
    if not len(columns.prompts):
        raise ConfigError(f"{place}.path", f"{path} has no rows", "name a file with at least one prompt")
    dataset = PromptDataset(name, str(path), section.input_key, columns)
    dataset.row(0)
    return dataset


def _read_json_lines(section: DataSection, place: str) -> _Columns:
    prompts: list[Any] = []
    labels: list[Any] = []
    datasources: list[str] = []
    for number, row in _json_rows(section.path, place):
        where = f"{section.path}, line {number}"
        prompts.append(_as_prompt(_cell(row, section.input_key, where, f"{place}.input_key"), where, section.input_key))
        if section.label_key is not None:
            labels.append(_as_json(_cell(row, section.label_key, where, f"{place}.label_key"), f"{where}, label"))
        datasources.append(str(row.get(section.datasource_key) or DEFAULT_DATASOURCE))
        if len(prompts) == section.max_samples:
            break
    return _Columns(prompts, labels if section.label_key is not None else None, datasources)


def _json_rows(path: Path, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, row); blank lines are passed over."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = f"is not JSON ({error.msg} at column {error.colno})"
                    raise ConfigError(f"{path}, line {number}", problem, "write one JSON object per line") from error
                if not isinstance(row, dict):
                    problem = f"holds {_json_kind(row)}"
                    raise ConfigError(f"{path}, line {number}", problem, "write one JSON object per line")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}.path", f"{path} cannot be read ({error})", "name a readable UTF-8 file") from error


def _cell(row: Mapping[str, Any], key: str, where: str, setting: str) -> Any:
    if key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise ConfigError(where, f"has no key {key!r}; its keys are {keys}", f"set {setting} to one of them")
    return row[key]


def _read_parquet(path: Path, place: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        problem = f"{path} is not a Parquet file ({_first_line(error)})"
        raise ConfigError(f"{place}.path", problem, "name one that is") from error


def _read_folder(section: DataSection, place: str) -> pa.Table:
    """A folder of `Dataset.save_to_disk`, or of `DatasetDict.save_to_disk` with one folder per split."""
    import pyarrow as pa

    folder = section.path
    if (folder / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").exists())
        if section.split not in splits:
            problem = f"{section.split!r} is not a split of {folder}, which has {', '.join(splits) or 'none'}"
            raise ConfigError(f"{place}.split", problem, "name one of them")
        folder = folder / section.split
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        return pa.concat_tables([_read_arrow(file) for file in files])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        problem = f"{folder} was not written by `datasets.save_to_disk` ({_first_line(error)})"
        raise ConfigError(f"{place}.path", problem, "name such a folder, or a JSONL or Parquet file") from error


def _read_arrow(file: Path) -> pa.Table:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def _from_table(table: pa.Table, section: DataSection, place: str) -> _Columns:
    if section.max_samples is not None:
        table = table.slice(0, section.max_samples)
    prompts = _column(table, section.input_key, section, f"{place}.input_key")
    if prompts.null_count:
        first = next(row for row, cell in enumerate(prompts) if not cell.is_valid)
        problem = f"has null under {section.input_key!r}"
        raise ConfigError(f"{section.path}, row {first + 1}", problem, "take the row out or give it a prompt")
    labels = None if section.label_key is None else _column(table, section.label_key, section, f"{place}.label_key")
    datasources = table.column(section.datasource_key) if section.datasource_key in table.column_names else None
    return _Columns(prompts, labels, datasources)


def _column(table: pa.Table, key: str, section: DataSection, setting: str) -> Any:
    if key not in table.column_names:
        problem = f"{key!r} is not a column of {section.path}, which has {', '.join(table.column_names) or 'none'}"
        raise ConfigError(setting, problem, "name one of them")
    return table.column(key)


def _python(cell: Any) -> Any:
    """The Python value of an Arrow cell; anything else as it is."""
    return cell.as_py() if hasattr(cell, "as_py") else cell


def _as_prompt(value: Any, place: str, key: str) -> str | list[dict[str, Any]]:
    """Text, or chat messages. Arrow fills fields that a message lacks with null: those are taken out again."""
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError(place, f"has an empty {key!r}", "take the row out or give it a prompt")
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return [
            {field: _as_json(part, f"{place}, {key}") for field, part in message.items() if part is not None}
            for message in value
        ]
    problem = f"has {_json_kind(value)} under {key!r}" + (" with other things in it" if isinstance(value, list) else "")
    raise ConfigError(place, problem, "prompts are text, or lists of messages with a role and a content")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and value.get("content") is not None


def _as_json(value: Any, place: str) -> Any:
    """The value with everything that JSON does not know replaced: numpy and Arrow values, tuples, dates, decimals.

    Raises:
        ConfigError: bytes, numbers that are not finite, or an object of an unknown type.
    """
    value = _python(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(place, f"{value} is not a JSON number", "replace it by a finite number or by text")
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(part, place) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(part, place) for part in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise ConfigError(place, f"a value of type {type(value).__name__} is not JSON", "store it as text")


def _json_kind(value: Any) -> str:
    value = _python(value)
    if value is None:
        return "null"
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
