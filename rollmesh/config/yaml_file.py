"""Mesh files as YAML, in which a value means the same to the program and to a person.

Plain values follow YAML 1.2, where PyYAML alone follows YAML 1.1: ``1e-5`` is a number; ``no``, ``on``, ``1:30``,
``2024-05-01`` and ``2024_05_01`` are text. Numbers of another base and numbers with leading zeros are text as well,
because a name such as ``007`` would change. A key that stands twice in one mapping is refused: YAML demands that, and
PyYAML does not do it. `load_yaml` reads back what `dump_yaml` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rollmesh.errors import ConfigError

_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_INT = re.compile(r"-?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
)
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with YAML 1.2's plain values, and with an error for a key that is written twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping after a check for repeated keys, with the merged keys (``<<``) under its own keys.

        PyYAML merges later; then a key that is written twice looks like a merged key. PyYAML 6.0.4 also decides wrongly
        where a merged mapping merges another mapping: the inner mapping's keys win over the merged mapping's own keys.
        """
        node = super().compose_mapping_node(anchor)
        own: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                first = own.setdefault((key.tag, key.value), key)
                if first is not key:
                    raise _RepeatedKeyError(key.value, first.start_mark.line + 1, key.start_mark)
        merge = next((value for key, value in node.value if key.tag == _MERGE_TAG), None)
        sources = merge.value if isinstance(merge, yaml.SequenceNode) else [merge]
        if all(isinstance(source, yaml.MappingNode) for source in sources):  # else the constructor reports the fault
            pairs = {
                (key.tag, str(key.value)): (key, value) for source in reversed(sources) for key, value in source.value
            }
            merged = [pair for name, pair in pairs.items() if name not in own]
            node.value = merged + [pair for pair in node.value if pair[0].tag != _MERGE_TAG]
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it also quotes text that YAML 1.2 takes for a number."""


_FIRST_CHARACTERS_OF_FLOATS = list("-+.0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FIRST_CHARACTERS_OF_FLOATS)
_Loader.add_implicit_resolver(_MERGE_TAG, re.compile(r"<<\Z"), ["<"])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FIRST_CHARACTERS_OF_FLOATS)


class _RepeatedKeyError(yaml.YAMLError):
    def __init__(self, key: str, first_line: int, mark: yaml.Mark) -> None:
        self.line = mark.line + 1
        super().__init__(f"has the key {key!r} again, which stands in line {first_line} already")


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a mesh file, with ``dotted.key=value`` overrides applied. Their values are YAML.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or an override is malformed.
    """
    tree = _parse(_read_text(path), str(path))
    if tree is None:
        raise ConfigError(str(path), "is empty", "write a mapping of sections")
    if not isinstance(tree, dict):
        raise ConfigError(str(path), f"holds a {type(tree).__name__}", "write a mapping of sections")
    _check_values(tree, str(path), (), ())
    for override in overrides:
        _apply_override(tree, override)
    return tree


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return YAML that `load_yaml` reads back to the same values."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "name a mesh file that can") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not text in UTF-8", "save it as UTF-8, or name a mesh file (YAML)") from error


def _parse(text: str, place: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKeyError as error:
        raise ConfigError(f"{place}, line {error.line}", str(error), "bring the two together") from error
    except RecursionError as error:
        raise ConfigError(place, "is nested too deeply", "write a mapping of sections") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # values such as `!!int text` raise the last two
        where, problem = _locate(place, text, error)
        fix = "indent with spaces" if "'\\t'" in problem else "correct the syntax there"
        raise ConfigError(where, f"is not valid YAML ({problem})", fix) from error


def _locate(place: str, text: str, error: Exception) -> tuple[str, str]:
    """Return the place of the fault in the file, and the problem there."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{place}, line {mark.line + 1}, column {mark.column + 1}", error.problem or "unreadable"
    if isinstance(error, yaml.reader.ReaderError):
        return f"{place}, line {text.count(chr(10), 0, error.position) + 1}", str(error.reason)
    return place, " ".join(str(error).split())


def _check_values(value: Any, file: str, keys: tuple[str, ...], above: tuple[int, ...]) -> None:
    """Refuse values that no setting can hold: keys other than text, text that no file can hold, and endless values."""
    place = ".".join(keys)
    if isinstance(value, str):
        _check_text(value, place)
    if not isinstance(value, (dict, list)):
        return
    if id(value) in above:
        raise ConfigError(file, f"contains itself at {place}", "remove the alias (*)")
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        if isinstance(value, dict) and not isinstance(key, str):
            where = f" under {place}" if place else ""
            raise ConfigError(file, f"has the key {key!r}{where}, which is no text", "put the key in quotes")
        _check_values(part, file, (*keys, str(key)), (*above, id(value)))


def _check_text(text: str, place: str) -> None:
    if "\0" in text:
        raise ConfigError(place, f"{text!r} has a zero character", "remove it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(place, f"{text!r} has half of a character (a surrogate)", "write the whole character")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("--set", f"{override!r} has no '='", "write it as dotted.key=value")
    place = f"--set {key}"
    try:
        value = yaml.load(text, Loader=_Loader)
    except _RepeatedKeyError as error:
        raise ConfigError(place, f"{text!r} {error}", "bring the two together") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(place, f"{text!r} is not a YAML value", "quote it") from error
    *parents, last = key.split(".")
    _check_values(value, place, tuple(key.split(".")), ())
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(place, f"{parent!r} is a value, not a section", "correct the path")
    node[last] = value
