"""Reading the columns of a dataset: JSON Lines, Parquet, folders of Parquet files and of `datasets.save_to_disk`.

This module finds the faults of a file as a whole. It leaves cells as the file has them; `rollmesh.data.rows` checks
cells. Only the columns that the run uses are read. The module imports neither torch nor `datasets`: pyarrow reads the
formats of `datasets`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollmesh.config import DataSection
from rollmesh.data.rows import first_line, kind_of
from rollmesh.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_SPLIT_FILE = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.].*)?\.parquet", re.IGNORECASE)
_GZIP = b"\x1f\x8b"
_ONE_OBJECT_PER_LINE = "write one JSON object per line"


@dataclass(frozen=True, slots=True)
class Columns:
    """The cells of a data file that the run uses, by column. Each column has one cell for each row.

    Attributes:
        prompts: the column of prompts.
        labels: the column of labels; None if the mesh file names no column of labels.
        datasources: the column of sources; None if the file has no such column.
        lines: the number of each row's line in the file, from 1; None if the file has no lines.
    """

    prompts: Sequence[Any]
    labels: Sequence[Any] | None
    datasources: Sequence[Any] | None
    lines: Sequence[int] | None = None


def read_columns(section: DataSection, place: str) -> Columns:
    """Return the columns that a data section of the mesh file names.

    Args:
        section: the file and its columns.
        place: the dotted path of the section, for messages.

    Raises:
        ConfigError: the file is missing, of an unknown kind, broken, or lacks a column.
    """
    path = section.path
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        if not is_folder and not is_file:
            problem = "is not a file" if path.exists() else "does not exist"
            raise ConfigError(f"{place}.path", f"{path} {problem}", "name a JSONL or Parquet file or a dataset folder")
        if is_folder:
            return _from_table(_read_folder(section, place), section)
        if path.suffix.lower() == ".parquet":
            return _from_table(_read_parquet([path], section, place), section)
        if path.suffix.lower() in _JSON_LINES:
            return _read_json_lines(section, place)
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror or first_line(error)})"
        raise ConfigError(f"{place}.path", problem, "make it readable, or name another") from error
    fix = "unpack it" if path.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip") else "use a .jsonl or .parquet file"
    raise ConfigError(f"{place}.path", f"{path} is of an unknown kind", fix)


def _read_json_lines(section: DataSection, place: str) -> Columns:
    prompts: list[Any] = []
    labels: list[Any] = []
    datasources: list[Any] = []
    lines: list[int] = []
    for number, row in _json_rows(section.path):
        where = f"{section.path}, line {number}"
        prompts.append(_cell(row, section.input_key, where, f"{place}.input_key"))
        if section.label_key is not None:
            labels.append(_cell(row, section.label_key, where, f"{place}.label_key"))
        datasources.append(row.get(section.datasource_key))
        lines.append(number)
        if len(prompts) == section.max_samples:
            break
    return Columns(prompts, labels if section.label_key is not None else None, datasources, lines)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row); blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            text = _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where)
            if not text.strip():
                continue
            row = _parse(text, where)
            if not isinstance(row, dict):
                raise ConfigError(where, f"holds {kind_of(row)}", _ONE_OBJECT_PER_LINE)
            yield number, row


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if line.startswith(_GZIP):
            raise ConfigError(where, "is compressed by gzip", "unpack the file") from error
        problem = f"is not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1})"
        raise ConfigError(where, problem, "save the file as UTF-8") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if text.strip() == "[":
            raise ConfigError(where, "begins a JSON array", _ONE_OBJECT_PER_LINE) from error
        problem = f"is not JSON ({error.msg} at column {error.colno})"
        raise ConfigError(where, problem, _ONE_OBJECT_PER_LINE) from error
    except ValueError as error:  # a key twice; an integer of more than 4,300 digits
        raise ConfigError(where, f"cannot be used ({first_line(error).split(';')[0]})", "correct the line") from error
    except RecursionError as error:
        raise ConfigError(where, "is nested too deeply", "store what is nested as text") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return value


def _cell(row: Mapping[str, Any], key: str, where: str, setting: str) -> Any:
    if key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise ConfigError(where, f"has no key {key!r}; its keys are {keys}", f"set {setting} to one of them")
    return row[key]


def _read_folder(section: DataSection, place: str) -> pa.Table:
    """Return the table in a folder that `Dataset.save_to_disk` wrote, or in one split of a folder that
    `DatasetDict.save_to_disk` wrote, or in a folder of Parquet files."""
    import pyarrow as pa

    folder = section.path
    if (folder / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").exists())
        folder = folder / _known_split(section, place, splits)
    elif not (folder / "state.json").exists():
        return _read_parquet(_parquet_files(section, place), section, place)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        tables = [_chosen(_read_arrow(file), file, section, place) for file in files]
        return pa.concat_tables(tables)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        problem = f"{folder} was not written by `datasets.save_to_disk` ({first_line(error)})"
        raise ConfigError(f"{place}.path", problem, "name such a folder, or a JSONL or Parquet file") from error


def _parquet_files(section: DataSection, place: str) -> list[Path]:
    """Return the Parquet files of a folder; only those of the section's split, if their names begin with splits."""
    files = sorted(file for file in section.path.iterdir() if file.suffix.lower() == ".parquet")
    if not files:
        problem = f"{section.path} holds neither Parquet files nor what `datasets.save_to_disk` writes"
        raise ConfigError(f"{place}.path", problem, "name such a folder, or a JSONL or Parquet file")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT_FILE.fullmatch(file.name)
        by_split.setdefault(match[1] if match else "", []).append(file)
    if set(by_split) == {""}:
        return files
    return by_split[_known_split(section, place, sorted(filter(None, by_split)))]


def _known_split(section: DataSection, place: str, splits: list[str]) -> str:
    if section.split not in splits:
        problem = f"{section.split!r} is not a split of {section.path}, which has {', '.join(splits) or 'none'}"
        raise ConfigError(f"{place}.split", problem, "name one of them")
    return section.split


def _read_parquet(files: Sequence[Path], section: DataSection, place: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                names = _used(file.schema_arrow.names, path, section, place)
                tables.append(file.read(columns=names))
        except (pa.ArrowException, OSError) as error:
            problem = f"{path} is not a Parquet file that can be read ({first_line(error)})"
            raise ConfigError(f"{place}.path", problem, "name one that is, or write it again") from error
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        problem = f"the files of {section.path} do not have the same columns ({first_line(error)})"
        raise ConfigError(f"{place}.path", problem, "write them again from one table") from error


def _read_arrow(file: Path) -> pa.Table:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def _chosen(table: pa.Table, file: Path, section: DataSection, place: str) -> pa.Table:
    return table.select(_used(table.column_names, file, section, place))


def _used(names: Sequence[str], file: Path, section: DataSection, place: str) -> list[str]:
    """Return the names of the columns of a file that the run uses.

    Raises:
        ConfigError: the file lacks such a column, or has the column twice.
    """
    wanted = {f"{place}.input_key": section.input_key, f"{place}.label_key": section.label_key}
    used = []
    for setting, key in wanted.items():
        if key is not None and key not in names:
            problem = f"{key!r} is not a column of {file}, which has {', '.join(names) or 'none'}"
            raise ConfigError(setting, problem, "name one of them")
        used += [] if key is None else [key]
    used += [section.datasource_key] if section.datasource_key in names else []
    used = list(dict.fromkeys(used))
    for key in used:
        if names.count(key) > 1:
            raise ConfigError(f"{place}.path", f"{file} has the column {key!r} {names.count(key)} times", "rename one")
    return used


def _from_table(table: pa.Table, section: DataSection) -> Columns:
    if section.max_samples is not None:
        table = table.slice(0, section.max_samples)
    return Columns(
        prompts=table.column(section.input_key),
        labels=None if section.label_key is None else table.column(section.label_key),
        datasources=table.column(section.datasource_key) if section.datasource_key in table.column_names else None,
    )
