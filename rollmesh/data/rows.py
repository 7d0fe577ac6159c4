"""The rule for the cells of a dataset's row. It applies before a run, and each time that a row is leased.

::

    cells of a file ── Python values ──► read_row ──► PromptRow: plain JSON, that every message of the mesh can carry
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollmesh.errors import ConfigError
from rollmesh.wire.limits import MAX_NAME_BYTES, MAX_TEXT_BYTES

DEFAULT_DATASOURCE = "default"
MAX_DEPTH = 100
"""The most levels of lists and objects in each other. Libraries that read JSON give up between 500 and 1,000 levels."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of a dataset after the checks.

    Attributes:
        prompt: text, or a non-empty list of chat messages (mappings with ``role`` and ``content``).
        label: any JSON value; None also where the dataset has no labels.
        has_label: whether the dataset has labels; a label may be ``null``.
        datasource: the name of the row's source, by which metrics are grouped.
    """

    prompt: str | list[dict[str, Any]]
    label: Any
    has_label: bool
    datasource: str

    @property
    def prompt_json(self) -> str:
        """The prompt as JSON."""
        return json.dumps(self.prompt, ensure_ascii=False)

    @property
    def label_json(self) -> str:
        """The label as JSON; empty where the dataset has no labels."""
        return json.dumps(self.label, ensure_ascii=False) if self.has_label else ""


@dataclass(frozen=True, slots=True)
class Cells:
    """The raw cells of one row, with the names of their columns.

    Attributes:
        place: the file and the row, for messages.
        prompt, label, datasource: Python values or Arrow scalars; None for a missing cell.
        has_label: whether the dataset has labels.
        prompt_key, label_key, datasource_key: the names of the columns.
    """

    place: str
    prompt: Any
    label: Any
    has_label: bool
    datasource: Any
    prompt_key: str
    label_key: str
    datasource_key: str


def read_row(cells: Cells) -> PromptRow:
    """Return the row that these cells make.

    Raises:
        ConfigError: a cell cannot be used; the message names file, row and column.
    """
    prompt_place, label_place = f"{cells.place}, {cells.prompt_key}", f"{cells.place}, {cells.label_key}"
    prompt = _prompt(_python(cells.prompt, prompt_place), prompt_place)
    label = _json_value(cells.label, label_place) if cells.has_label else None
    datasource = _datasource(cells.datasource, f"{cells.place}, {cells.datasource_key}")
    row = PromptRow(prompt, label, cells.has_label, datasource)
    _check_text(row.prompt_json, prompt_place, MAX_TEXT_BYTES)
    _check_text(row.label_json, label_place, MAX_TEXT_BYTES)
    return row


def _prompt(value: Any, place: str) -> str | list[dict[str, Any]]:
    """Return the prompt: text, or chat messages. Arrow adds null fields to a message; they are removed."""
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError(place, "is empty", "take the row out or give it a prompt")
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return [
            {str(field): _json_value(part, place) for field, part in message.items() if part is not None}
            for message in value
        ]
    problem = f"is {kind_of(value)}" + (" with other things in it" if isinstance(value, list) and value else "")
    raise ConfigError(place, problem, "prompts are text, or lists of messages with a role and a content")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and value.get("content") is not None


def _datasource(cell: Any, place: str) -> str:
    value = _python(cell, place)
    if value is None or value == "":
        return DEFAULT_DATASOURCE
    if not isinstance(value, (str, int, float)):
        raise ConfigError(place, f"is {kind_of(value)}", "name the source of a row by text")
    text = str(value)
    _check_text(text, place, MAX_NAME_BYTES)
    if not text.isprintable():
        raise ConfigError(place, f"{text!r} has a character that cannot be printed", "name the source by plain text")
    return text


def _check_text(text: str, place: str, limit: int) -> None:
    """Raise ConfigError if the text is longer than ``limit`` bytes, or if UTF-8 cannot encode the text."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ConfigError(
            place, f"has half of a character ({half!r}, a surrogate)", "take it out, or write the whole character"
        ) from error
    if num_bytes > limit:
        raise ConfigError(place, f"has {num_bytes:,} bytes, and at most {limit:,} can be sent", "shorten it")


def _json_value(value: Any, place: str, depth: int = 0) -> Any:
    """Return the value as a JSON value: numpy and Arrow values, tuples, dates and decimals are replaced.

    Raises:
        ConfigError: the value holds bytes, a number that is not finite, an object of an unknown type, or too many
            levels.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(place, f"is nested more than {MAX_DEPTH} levels deep", "store it as text")
    value = _python(value, place)
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
        return {str(key): _json_value(part, place, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(part, place, depth + 1) for part in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise ConfigError(place, f"a value of type {type(value).__name__} is not JSON", "store it as text")


def _python(cell: Any, place: str) -> Any:
    """Return the Python value of an Arrow cell, and any other cell as it is.

    Raises:
        ConfigError: the cell has no Python value.
    """
    if not hasattr(cell, "as_py"):
        return cell
    try:
        return cell.as_py()
    except (ValueError, OverflowError, NotImplementedError) as error:  # bytes that are no text, a date in year 10,000
        raise ConfigError(place, f"cannot be read ({first_line(error)})", "take the row out or correct it") from error


def kind_of(value: Any) -> str:
    """Return a person's word for the kind of a value, such as "a list"."""
    if value is None:
        return "null"
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
