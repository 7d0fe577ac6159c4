"""Describe an unexpected exception in one sentence: its type, its message, and the place in our code.

The traceback goes to the log. The sentence goes to the last ``error: `` line on stderr, which the launcher repeats.
"""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path

FULL_BELOW_BYTES = 64 * 1024
"""A disk with less free space than this counts as full: not even a page of accounting is sure to fit."""

_OURS = tuple(str(Path(__file__).resolve().parents[2] / name) + os.sep for name in ("rollmesh", "services"))
_LONGEST_MESSAGE = 500


def report_crash(error: BaseException) -> str:
    """Log the traceback of an unexpected exception. Return the sentence that describes the exception."""
    logging.getLogger("rollmesh").critical("uncaught exception", exc_info=error)
    return describe_crash(error)


def describe_crash(error: BaseException) -> str:
    """Return one line, e.g. ``KeyError: 'reward' (at services/learner/loop.py:81, in _step)``.

    Of a group of exceptions the line describes the first exception.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    message = " ".join(str(error).split())
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "…"
    kind = type(error).__name__
    sentence = f"{kind}: {message}" if message else kind
    place = _place(error)
    return f"{sentence} (at {place})" if place else sentence


def _place(error: BaseException) -> str:
    """Return the innermost line of our own code, else the innermost line; empty where the traceback has no line."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    frame = (ours or frames)[-1]
    root = Path(__file__).resolve().parents[2]
    path = Path(frame.filename)
    shown = path.relative_to(root) if ours else path
    return f"{shown}:{frame.lineno}, in {frame.name}"


def full_disk(folder: Path) -> str:
    """Return the clause ``; no space is left on the disk of <folder>``; empty while the disk has space."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return ""
    free_bytes = disk.f_bavail * disk.f_frsize
    return f"; no space is left on the disk of {folder}" if free_bytes < FULL_BELOW_BYTES else ""
