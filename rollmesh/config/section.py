"""The base class of all configuration sections, and the validation of a parsed mesh file."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from rollmesh.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
"""``$NAME`` or ``${NAME}``."""

_SHOWN_CHARACTERS = 80


class Section(BaseModel):
    """A frozen group of settings; an unknown key is refused.

    The string under a field documents the field; ``model_json_schema`` and ``rollmesh config schema`` show it. A path
    may begin with ``~`` and may hold ``$VARIABLE``. A relative path is relative to the working directory.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _read_values(cls, given: Any) -> Any:
        """Return the settings as a person reads them: paths are expanded, and a truth value in place of a number is
        refused. This validator belongs to the model, because a field's own validator may not touch the discriminator of
        a union."""
        if not isinstance(given, dict):
            return given
        kinds = _kinds_of_fields(cls)
        return {key: _read_value(kinds[key], key, value) if key in kinds else value for key, value in given.items()}


class _FieldError(ValueError):
    """A value that the user cannot have meant; ``fix`` names an acceptable value."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        super().__init__(fix)
        self.field = field
        self.value = value


def _read_value(kinds: set[type], name: str, value: Any) -> Any:
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise _FieldError(name, value, "it should be a number")  # and not 0 or 1
    if not isinstance(value, str) or Path not in kinds:
        return value
    try:
        return _expand_path(value)
    except ValueError as error:
        raise _FieldError(name, value, str(error)) from error


@functools.cache
def _kinds_of_fields(section: type[Section]) -> dict[str, set[type]]:
    return {name: _kinds(field.annotation) for name, field in section.model_fields.items()}


def _kinds(annotation: Any) -> set[type]:
    """Return the types in an annotation: {int, NoneType} for ``PositiveInt | None``, {int} for ``Literal[0, 1]``."""
    parts = get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set[type]().union(*(_kinds(part) for part in parts))


def _expand_path(text: str) -> str:
    """Return ``text`` with the home folder in place of ``~``, and with the values of environment variables in place of
    their names.

    Raises:
        ValueError: the text is empty, or names a variable or a user that does not exist.
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


def with_absolute_paths(section: SectionT) -> SectionT:
    """Return a copy in which every path is absolute. A relative path starts at the working directory."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[name] = Path(os.path.abspath(value))
    return section.model_copy(update=changes)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``above`` over the settings of ``below``, section by section."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def validate(model: type[SectionT], tree: dict[str, Any]) -> SectionT:
    """Return a ``model`` built from a parsed mesh file.

    Raises:
        ConfigError: the file has a fault. One sentence names the dotted path, the value and the fix of the first fault.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # Unknown keys come first: where a key is misspelt, the right key is missing as well.
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        missing = [str(fault["loc"][0]) for fault in faults if fault["type"] == "missing" and len(fault["loc"]) == 1]
        if len(missing) > 1 and faults[0]["type"] == "missing":
            raise ConfigError(", ".join(missing), "are missing", "add these sections") from error
        raise _as_config_error(model, faults[0]) from error


def _as_config_error(model: type[Section], detail: ErrorDetails) -> ConfigError:
    original = detail.get("ctx", {}).get("error")
    if isinstance(original, ConfigError):
        return original
    if isinstance(original, _FieldError):
        path = ".".join([*_follow(model, detail["loc"]).parts, original.field])
        return ConfigError(path, f"{_shown(original.value)} is not accepted", str(original))
    place = _follow(model, detail["loc"])
    path = ".".join(place.parts) or "configuration"
    if detail["type"] == "extra_forbidden":
        return _unknown_key(place, path)
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_variant(detail, path)
    if detail["type"] == "missing":
        return ConfigError(path, "is missing", "set it")
    if detail["type"] in ("model_type", "model_attributes_type"):
        return ConfigError(path, f"{_shown(detail['input'])} is not a section", "write a mapping of settings")
    if detail["type"] == "string_type" and isinstance(detail["input"], (bool, int, float)):
        return ConfigError(path, f"{_shown(detail['input'])} is no text", "put it in quotes")
    message = detail["msg"].removeprefix("Value error, ")
    fix = re.sub(r"^(Input|String|Value|Tuple|List) should", "it should", message)
    return ConfigError(path, f"{_shown(detail['input'])} is not accepted", fix)


def _shown(value: object) -> str:
    """Return a value for a message, cut after enough characters to find the value in the file."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


class _Place(NamedTuple):
    """The place in a mesh file where pydantic found a fault.

    Attributes:
        parts: the parts of the dotted path. Pydantic's own path also names the variant; a mesh file does not.
        owner: the section that holds the last part; None inside a free mapping or list.
        variants: the variants of that section, by the values of their discriminator.
        variant: the value of the discriminator that the file chose.
    """

    parts: list[str]
    owner: type[Section] | None
    variants: dict[str, type[Section]]
    variant: str


def _follow(model: type[Section], loc: tuple[int | str, ...]) -> _Place:
    parts: list[str] = []
    inner: type[Section] | None = model
    owner: type[Section] | None = None
    variants: dict[str, type[Section]] = {}
    variant = ""
    is_variant_next = False
    for part in loc:
        if is_variant_next:
            inner, variant, is_variant_next = variants.get(str(part)), str(part), False
            continue
        parts.append(str(part))
        owner, inner = inner, None
        field = None if owner is None else owner.model_fields.get(str(part))
        if field is None:
            continue
        if isinstance(field.discriminator, str):
            variants, is_variant_next = _variants(field.annotation, field.discriminator), True
        else:
            inner, variants = _section_type(field.annotation), {}
    return _Place(parts, owner, variants, variant)


def _variants(annotation: Any, discriminator: str) -> dict[str, type[Section]]:
    """Return the section for each value of the discriminator."""
    return {
        str(value): section
        for section in get_args(annotation)
        for value in get_args(section.model_fields[discriminator].annotation)
    }


def _unknown_key(place: _Place, path: str) -> ConfigError:
    key = place.parts[-1]
    others = [name for name, section in place.variants.items() if key in section.model_fields]
    if others:
        problem = f"belongs to {', '.join(others)} and not to {place.variant}"
        section = ".".join(place.parts[:-1])
        return ConfigError(path, problem, f"remove it, or set the whole section: {section}={{type: {place.variant}}}")
    known = sorted({} if place.owner is None else place.owner.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    fix = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    return ConfigError(path, "is not a known key", fix)


def _unknown_variant(detail: ErrorDetails, path: str) -> ConfigError:
    context = detail["ctx"]
    place = f"{path}.{context['discriminator'].strip(chr(39))}"
    if detail["type"] == "union_tag_not_found":
        return ConfigError(place, "is missing", "set it")
    return ConfigError(
        place, f"{_shown(context['tag'])} is not accepted", f"it should be one of {context['expected_tags']}"
    )


def _section_type(annotation: Any) -> type[Section] | None:
    """Return the section class inside an annotation such as ``Section | None``; None if there is none."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
