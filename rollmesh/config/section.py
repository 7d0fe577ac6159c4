"""Base of all configuration sections, and the way from a parsed mesh file to a validated model."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from rollmesh.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
"""``$NAME`` or ``${NAME}``."""


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know.

    The string under a field is its documentation (``model_json_schema`` and ``rollmesh config schema`` show it). Paths
    may begin with ``~`` and hold ``$VARIABLE``; relative ones are relative to the working directory.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_value(cls, value: Any, info: ValidationInfo) -> Any:
        """What pydantic alone would take differently from how a person means it."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("it should be a number")  # and not 0 or 1
        if isinstance(value, str) and Path in kinds:
            return _expand_path(value)
        return value


def _kinds(annotation: Any) -> set[type]:
    """The types in an annotation: {int, NoneType} for ``PositiveInt | None``, {int} for ``Literal[0, 1]``."""
    parts = get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set[type]().union(*(_kinds(part) for part in parts))


def _expand_path(text: str) -> str:
    """``text`` with the home folder in place of ``~`` and the values of environment variables in place of their names.

    Raises:
        ValueError: the text is empty, or names a variable or a user that is not there.
    """
    if not text.strip():
        raise ValueError("name a path; the working directory is '.'")

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"set the environment variable {name}, or write the path out")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value_of, text))
    if expanded.startswith("~"):
        user = expanded[1:].partition("/")[0]
        raise ValueError(f"there is no user {user!r} here; write the path out, or ./{text}")
    return expanded


SectionT = TypeVar("SectionT", bound=Section)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def validate(model: type[SectionT], tree: dict[str, Any]) -> SectionT:
    """Build ``model`` from a parsed mesh file.

    Raises:
        ConfigError: one sentence for the first fault found: dotted path, value and fix.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _as_config_error(model, error.errors()[0]) from error


def _as_config_error(model: type[Section], detail: ErrorDetails) -> ConfigError:
    original = detail.get("ctx", {}).get("error")
    if isinstance(original, ConfigError):
        return original
    path = ".".join(str(part) for part in detail["loc"]) or "configuration"
    if detail["type"] == "extra_forbidden":
        return _unknown_key(model, detail["loc"], path)
    if detail["type"] == "missing":
        return ConfigError(path, "is missing", "set it")
    if detail["type"] in ("model_type", "model_attributes_type"):
        return ConfigError(path, f"{detail['input']!r} is not a section", "write a mapping of settings")
    if detail["type"] == "string_type" and isinstance(detail["input"], (bool, int, float)):
        return ConfigError(path, f"{detail['input']!r} is no text", "put it in quotes")
    message = detail["msg"].removeprefix("Value error, ")
    fix = re.sub(r"^(Input|String|Value|Tuple|List) should", "it should", message)
    return ConfigError(path, f"{detail['input']!r} is not accepted", fix)


def _unknown_key(model: type[Section], loc: tuple[int | str, ...], path: str) -> ConfigError:
    owner: Any = model
    for part in loc[:-1]:
        field = getattr(owner, "model_fields", {}).get(part)
        owner = _section_type(field.annotation) if field is not None else None
    known = sorted(getattr(owner, "model_fields", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    fix = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    return ConfigError(path, "is not a known key", fix)


def _section_type(annotation: Any) -> Any:
    """The section class inside an annotation such as ``Section | None``."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
