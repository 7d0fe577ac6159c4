"""A mesh file means what a person reads in it: nothing is lost, nothing changes its type, every fault has a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.config import dump_yaml, load_yaml
from rollmesh.errors import ConfigError


def loaded(tmp_path: Path, content: str | bytes, *overrides: str) -> dict[str, Any]:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_yaml(path, overrides)


def fault(tmp_path: Path, content: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, content, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("learner: {a: 1}\nrun: {}\nlearner: {b: 2}\n", "learner", 1, 3),
        ("learner:\n  optimizer:\n    lr: 1\n    eps: 2\n    lr: 3\n", "lr", 3, 5),
        ("a:\n  - b: 1\n    b: 1\n", "b", 2, 3),
        ("a: {b: 1, b: 1}\n", "b", 1, 1),
        ("base: &b {x: 1}\na:\n  <<: *b\n  <<: *b\n", "<<", 3, 4),
        ("'a': 1\n\"a\": 2\n", "a", 1, 2),
    ],
)
def test_a_key_that_is_written_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, first: int, second: int
) -> None:
    message = fault(tmp_path, text)
    assert f"mesh.yaml, line {second}: " in message
    assert f"{key!r} again" in message
    assert f"line {first}" in message


def test_a_key_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    assert "--set learner: " in fault(tmp_path, "a: 1", "learner={lr: 1, lr: 2}")


def test_anchors_and_merged_keys_are_understood(tmp_path: Path) -> None:
    text = "top:\n  inner: &a\n    <<: &b {x: 1, y: 2}\n    x: 3\nother:\n  <<: *a\n  y: 4\n"
    assert loaded(tmp_path, text) == {"top": {"inner": {"x": 3, "y": 2}}, "other": {"x": 3, "y": 4}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("-.5", -0.5),
        ("3E4", 3e4),
        ("20240501", 20240501),
        ("-1", -1),
        ("010", "010"),
        ("2024_05_01", "2024_05_01"),
        ("1:30", "1:30"),
        ("2024-05-01", "2024-05-01"),
        ("0x1F", "0x1F"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-5'", "1e-5"),
    ],
)
def test_a_plain_value_is_what_a_person_reads(tmp_path: Path, text: str, value: object) -> None:
    for tree in (loaded(tmp_path, f"a: {text}\n"), loaded(tmp_path, "b: 1", f"a={text}")):
        assert tree["a"] == value
        assert type(tree["a"]) is type(value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "mesh.yaml: is empty; write a mapping of sections"),
        (b"# nothing\n", "mesh.yaml: is empty"),
        (b"- a", "holds a list; write a mapping of sections"),
        (b"text", "holds a str; write a mapping of sections"),
        (b"a:\n\tb: 1\n", "mesh.yaml, line 2, column 1: is not valid YAML"),
        (b"a:\n\tb: 1\n", "indent with spaces"),
        (b"a: 1\n---\nb: 2\n", "mesh.yaml, line 2"),
        (b"a: !!python/object:os.system {}\n", "mesh.yaml, line 1"),
        (b"a: !!int text\n", "is not valid YAML"),
        (b"a: " + b"9" * 5000, "is not valid YAML"),
        (b"a: " + b"[" * 5000, "is nested too deeply"),
        (b"a: &x [*x]\n", "mesh.yaml: contains itself at a"),
        (b'a: "\\UFFFFFFFF"\n', "is not valid YAML"),
        (b"a: 1\nb: \x01\n", "mesh.yaml, line 2"),
        ("a: 1\n".encode("utf-16"), "is not text in UTF-8; save it as UTF-8"),
        (b"a: \xff\n", "is not text in UTF-8"),
        (b'a: {b: ["x", "\\ud83d"]}\n', "a.b.1: '\\ud83d' has half of a character"),
        (b'a: "x\\0y"\n', "a: "),
        (b"1: x\n", "mesh.yaml: has the key 1, which is no text; put the key in quotes"),
        (b"a: {true: x}\n", "mesh.yaml: has the key True under a"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes, problem: str) -> None:
    assert problem in fault(tmp_path, content)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert loaded(tmp_path, b"\xef\xbb\xbfa: 1\n") == {"a": 1}


def test_a_folder_is_no_mesh_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.sampled_from(
        ["1e5", "1e-5", "010", "no", "on", "2024-05-01", "0o7", "1_0", "~", "", ".5", "=", "<<", "1.", "+1"]
    ),
)


@given(st.dictionaries(st.sampled_from("abc"), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("written") / "mesh.yaml"
    path.write_text(dump_yaml(tree), encoding="utf-8")
    assert load_yaml(path) == tree
