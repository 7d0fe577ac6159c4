"""Base of all configuration sections, and the way from a YAML file and overrides to a validated model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from rollmesh.errors import ConfigError


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know.

    The string under a field is its documentation (``model_json_schema`` and ``rollmesh config schema`` show it).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a mesh file and apply ``dotted.key=value`` overrides, values in YAML syntax.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or an override is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "name a mesh file that can") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not text in UTF-8", "name a mesh file (YAML)") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place, problem = _locate(path, error)
        raise ConfigError(place, f"is not valid YAML ({problem})", "correct the syntax there") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(str(path), f"holds a {type(tree).__name__}", "write a mapping of sections")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _locate(path: Path, error: yaml.YAMLError) -> tuple[str, str]:
    """Where in the file, and what."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{path}, line {mark.line + 1}, column {mark.column + 1}", error.problem or "unreadable"
    return str(path), " ".join(str(error).split())


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("--set", f"{override!r} has no '='", "write it as dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}", f"{text!r} is not a YAML value", "quote it") from error
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}", f"{parent!r} is a value, not a section", "correct the path")
    node[last] = value


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
