"""A file with one JSON object a line. A run appends objects; a resumed run goes on with the same file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError
from rollmesh.telemetry.whole_file import write_whole


class JsonLines:
    """A file with one JSON object a line, which no other process writes meanwhile.

    A process that was killed may leave a last line that is no whole object. `read` skips that line; `append` and `keep`
    remove it.

    Args:
        path: the path of the file. The file need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_checked = False

    def read(self) -> list[dict[str, Any]]:
        """Return all objects, in the order of the file.

        Raises:
            ConfigError: a line before the last one is no JSON object. The message names the file and the line.
        """
        return [entry for _, entry in self._lines()]

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an object at the end of the file, and flush the file.

        Raises:
            ValueError: a number of the object is not finite.
        """
        line = json.dumps(entry, allow_nan=False) + "\n"
        if not self._is_checked:
            self._write_again([text for text, _ in self._lines()])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the objects for which ``is_kept`` is false. A reader finds either the old file or the new file."""
        self._write_again([text for text, entry in self._lines() if is_kept(entry)])

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = text.split("\n")
        entries = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("no object")
            except ValueError as error:
                if number == len(lines):  # a last line without its end was being written
                    break
                problem = f"line {number} is no JSON object ({error})"
                raise ConfigError(str(self._path), problem, "remove that line") from error
            entries.append((line, entry))
        return entries

    def _write_again(self, lines: list[str]) -> None:
        """Replace the lines of the file by ``lines``, unless the file has these lines already."""
        text = "".join(f"{line}\n" for line in lines)
        self._is_checked = True
        if not self._path.exists() or self._path.read_bytes() == text.encode("utf-8"):
            return
        write_whole(self._path, text)
