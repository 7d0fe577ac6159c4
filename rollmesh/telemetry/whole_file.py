"""Files that a reader never finds half written, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file. A reader finds the whole old content or the whole new content, whatever happens meanwhile.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the old content stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write_synced(partial, content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a file in place; on return the content is on disk. Text is written as UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
