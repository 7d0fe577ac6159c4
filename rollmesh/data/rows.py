"""What a row of a dataset may hold: one rule, before a run and whenever a row is leased.

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
"""Lists and objects inside each other; libraries that read JSON give up somewhere between 500 and 1,000."""


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
class Cells:
    """The cells of one row as the file has them, and what their columns are called.

    Attributes:
        place: file and row, for messages.
        prompt, label, datasource: Python values or Arrow scalars; None for a cell that is not there.
        has_label: whether the dataset has labels.
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
    """The row that these cells make.

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
    """Text, or chat messages. Arrow fills fields that a message lacks with null: those are taken out again."""
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
    """Refuse what no message can carry."""
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
    """The value with everything that JSON does not know replaced: numpy and Arrow values, tuples, dates, decimals.

    Raises:
        ConfigError: bytes, numbers that are not finite, an object of an unknown type, or too many levels.
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
    """The Python value of an Arrow cell; anything else as it is."""
    if not hasattr(cell, "as_py"):
        return cell
    try:
        return cell.as_py()
    except (ValueError, OverflowError, NotImplementedError) as error:  # bytes that are no text, a date in year 10,000
        raise ConfigError(place, f"cannot be read ({first_line(error)})", "take the row out or correct it") from error


def kind_of(value: Any) -> str:
    """What a person calls such a value."""
    if value is None:
        return "null"
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
