"""Whatever stands under whatever key: a mesh file is accepted and reads back the same, or refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rollmesh.config import Section, load_yaml, validate
from rollmesh.config.shared import NumSamples, NumTokens
from rollmesh.errors import ConfigError
from rollmesh.wire.limits import MAX_SAMPLES, MAX_TOKENS
from services.config import MeshConfig, dump_mesh
from tests.unit.config.test_mesh import MINIMAL

HUGE = 10**30
VALUES: list[Any] = [
    None,
    True,
    -1,
    HUGE,
    1.5,
    float("inf"),
    "",
    "1e5",
    "a\nb",
    "9" * 5000,
    [[1]],
    {"a": 1},
    {"type": 3},
]


def paths(model: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of every key that a mesh file may have."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for section in sections(field.annotation):
            yield from paths(section, (*above, name))


def sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(MINIMAL)
    node = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value
    return tree


@pytest.mark.parametrize("top", sorted(MeshConfig.model_fields))
def test_any_value_under_any_key_is_accepted_whole_or_refused_in_one_sentence(top: str, tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    for path in sorted({path for path in paths(MeshConfig) if path[0] == top}):
        for value in VALUES:
            try:
                config = validate(MeshConfig, with_value(path, value))
            except ConfigError as error:
                sentence = str(error)
                assert "\n" not in sentence
                assert len(sentence) < 400, sentence
                continue
            assert validate(MeshConfig, config.model_dump(mode="json")) == config, (path, value)
            if value == "1e5":  # YAML takes long; what it does with a value does not depend on the key
                file.write_text(dump_mesh(config), encoding="utf-8")
                assert validate(MeshConfig, load_yaml(file)) == config, path


def test_no_number_of_things_is_larger_than_the_wire_takes() -> None:
    accepted = []
    for path in sorted(set(paths(MeshConfig))):
        try:
            value: Any = validate(MeshConfig, with_value(path, HUGE))
        except ConfigError:
            continue
        for key in path:
            value = getattr(value, key)
        accepted += [path] if isinstance(value, int) else []
    assert accepted == []


def test_the_bounds_are_those_of_the_wire() -> None:
    for kind, limit in ((NumSamples, MAX_SAMPLES), (NumTokens, MAX_TOKENS)):
        assert any(getattr(bound, "le", None) == limit for bound in get_args(kind)[1].metadata)
