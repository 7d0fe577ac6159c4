"""Output ends no process: readers go away, disks fill up, encodings lack characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from rollmesh.telemetry import output
output.install(is_dispensable={is_dispensable})
print("\\u03b1 \\u00b7 \\udcff \\u00b1 1", flush=True)
print("to stderr", file=sys.stderr, flush=True)
open({marker!r}, "w").close()
"""


def _run(tmp_path: Path, stdout: int, *, is_dispensable: bool = False, **environment: str) -> tuple[int, str, bool]:
    """Exit code, stderr, and whether the program came to its end."""
    marker = tmp_path / "marker"
    program = PROGRAM.format(is_dispensable=is_dispensable, marker=str(marker))
    result = subprocess.run(
        [sys.executable, "-c", program],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    return result.returncode, result.stderr, marker.exists()


def test_a_reader_that_went_away_ends_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert _run(tmp_path, write) == (0, "to stderr\n", True)
    finally:
        os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_an_error_only_where_the_output_is_the_purpose(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert _run(tmp_path, full.fileno(), is_dispensable=True) == (0, "to stderr\n", True)
        (tmp_path / "marker").unlink()
        code, errors, has_ended = _run(tmp_path, full.fileno())
    assert (code, has_ended) == (1, False)
    assert "output: cannot be written (No space left on device)" in errors


@pytest.mark.parametrize(
    "surroundings",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["PYTHONIOENCODING", "C-locale"],
)
def test_a_character_that_the_encoding_lacks_becomes_a_plain_one(tmp_path: Path, surroundings: dict[str, str]) -> None:
    copy = tmp_path / "copy"
    with copy.open("wb") as sink:
        code, _, has_ended = _run(tmp_path, sink.fileno(), **surroundings)
    assert (code, has_ended) == (0, True)
    assert copy.read_bytes() == b"\\u03b1 - \xff +- 1\n"


def test_a_terminal_that_was_closed_ends_nothing(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    os.close(ours)
    try:
        assert _run(tmp_path, theirs) == (0, "to stderr\n", True)
    finally:
        os.close(theirs)
