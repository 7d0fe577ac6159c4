"""The command line: what its texts name exists, and whatever ends a command is one sentence."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rollmesh.cli
from rollmesh.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
NO_VERBS = {"is", "can", "cannot", "has", "does", "and", "or", "for", "with", "never", "holds", "gives", "services"}
"""Words that follow the project's name in a sentence about it."""


def _parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, child in action.choices.items():
                yield from _parsers(child, f"{name} {verb}")


def _texts() -> dict[str, str]:
    """All help texts, documents and comments that tell people what to type, by their place."""
    texts = {name: parser.format_help() for name, parser in _parsers(build_parser(), "rollmesh")}
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    for folder, pattern in (("rollmesh", "*.py"), ("services", "*.py"), ("examples", "*.md"), ("examples", "*.yaml")):
        files += (ROOT / folder).rglob(pattern)
    return texts | {str(path): path.read_text(encoding="utf-8") for path in files if "/v1/" not in str(path)}


def test_every_command_that_a_text_names_exists() -> None:
    known = {name for name, _ in _parsers(build_parser(), "rollmesh")}
    for place, text in _texts().items():
        for verbs in re.findall(r"(?:`|bin/|^\s*|\$ |\| )rollmesh ((?:[a-z|]+ ?){1,2})", text, re.MULTILINE):
            first, _, second = verbs.strip().partition(" ")
            for verb in first.split("|"):
                assert f"rollmesh {verb}" in known or verb in NO_VERBS, f"{place} names `rollmesh {verb}`"
            if first == "config" and second:
                assert f"rollmesh config {second}" in known, f"{place} names `rollmesh config {second}`"


def test_the_help_of_config_names_its_verbs_and_no_other() -> None:
    line = next(line for line in build_parser().format_help().splitlines() if line.strip().startswith("config "))
    named = set(re.findall(r"\b(check|show|list|explain|edit|diff|init)\b", line))
    assert named == {"check", "show", "list"}  # `config schema` lists


def test_an_exception_that_is_none_of_ours_is_one_sentence_and_its_traceback_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise KeyError("reward")

    monkeypatch.setattr(rollmesh.cli, "_services", fail)
    assert main(["config", "schema"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: KeyError: 'reward' \(at rollmesh/cli\.py:\d+, in \w+\)", error)
    assert caplog.records[-1].exc_info is not None


def _in_shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} -m rollmesh.cli"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("rollmesh", program)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path: Path) -> None:
    result = _in_shell("rollmesh config schema | head -n 1", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "{\n", "")


def test_modules_of_the_users_folder_do_not_replace_ours(tmp_path: Path) -> None:
    for name in ("services", "redis", "yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong module')\n")
    assert _in_shell("rollmesh config schema", tmp_path).returncode == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("redis", "yaml"):
        (tmp_path / name / "__init__.py").unlink()
        (tmp_path / name).rmdir()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert _in_shell("rollmesh config schema", elsewhere, PYTHONPATH=path).returncode == 0
