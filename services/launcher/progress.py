"""The line of progress: the state of the mesh in one line, the most important facts first."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TextIO

from rollmesh.types import MeshStatus, RunState

PLAIN_INTERVAL_S = 10.0
"""Time between two lines where the output is no terminal and no step has ended."""
USUAL_COLUMNS = 80
"""The assumed width of a terminal that does not tell its width."""
_SEPARATOR = " · "


def format_status(status: MeshStatus, expected: Sequence[str] = ()) -> str:
    """Return the state of the mesh as one line of any length.

    Args:
        status: the coordinator's status.
        expected: the members that were started. While the mesh is starting, the line names those that are not up yet.
    """
    return _SEPARATOR.join(_parts(status, expected))


def fit(parts: Sequence[str], columns: int) -> str:
    """Return as many of ``parts``, from the first on, as fit into ``columns``.

    A part that does not fit is left out as a whole. The second part is cut instead: it says what the mesh waits for.
    """
    line = parts[0]
    for index, part in enumerate(parts[1:]):
        longer = line + _SEPARATOR + part
        if len(longer) > columns:
            if index == 0:
                line = longer[: columns - 1] + "…"
            break
        line = longer
    return line[:columns]


def _parts(status: MeshStatus, expected: Sequence[str]) -> list[str]:
    """Return the parts of the line, the most important part first."""
    if status.run_state is RunState.STARTING:
        return _parts_of_start(status, expected)
    parts = [f"step {status.step}/{status.num_steps}"]
    if status.waiting_for:
        parts.append(status.waiting_for)
    if "reward/mean" in status.metrics:
        parts.append(f"reward {status.metrics['reward/mean']:.3f}")
    if status.last_evaluation is not None:
        result = status.last_evaluation
        parts.append(f"pass@1 {result.pass_at_1:.3f} (v{result.version.number})")
    parts.append(f"{status.generated_tokens_per_s:,.0f} tok/s")
    if "staleness/mean" in status.metrics:
        parts.append(f"staleness {status.metrics['staleness/mean']:.2f}")
    if num_filtered := status.num_groups.get("filtered", 0):
        parts.append(f"filtered {num_filtered}")
    parts += [f"queue {status.num_groups.get('ready', 0)}", f"slots {status.num_slots_used}/{status.num_slots}"]
    if status.committed_version is not None:
        parts.append(f"v{status.committed_version.number}")
    return parts


def _parts_of_start(status: MeshStatus, expected: Sequence[str]) -> list[str]:
    up = [member.name for member in status.members]
    missing = [name for name in expected if name not in up]
    if missing:
        return ["starting", f"loading {', '.join(missing)}", f"{len(expected) - len(missing)} of {len(expected)} up"]
    waits = [status.waiting_for] if status.waiting_for else []
    return ["starting", *waits, f"up: {', '.join(up) or 'nobody yet'}"]


class ProgressLine:
    """The line of progress on a stream.

    On a terminal the line is rewritten in place. On another stream a new line is written when the state of the run, the
    step or the last evaluation has changed, and when `PLAIN_INTERVAL_S` have passed.

    Args:
        stream: the stream that gets the line.
        expected: the members that were started.
    """

    def __init__(self, stream: TextIO, expected: Sequence[str] = ()) -> None:
        self._stream = stream
        self._expected = expected
        self._is_terminal = stream.isatty()
        self._has_line = False
        self._started = time.monotonic()
        self._last_key: tuple[object, ...] = ()
        self._last_written = float("-inf")

    def show(self, status: MeshStatus) -> None:
        """Show the status, with the minutes and seconds since the start in front."""
        first, *rest = _parts(status, self._expected)
        parts = [f"{_clock(time.monotonic() - self._started)} {first}", *rest]
        if self._is_terminal:
            self._has_line = True
            self._stream.write("\r\x1b[K" + fit(parts, _columns(self._stream) - 1))
            self._stream.flush()
            return
        key = (status.run_state, status.step, status.last_evaluation)
        now = time.monotonic()
        if key != self._last_key or now - self._last_written > PLAIN_INTERVAL_S:
            self._last_key, self._last_written = key, now
            self._stream.write(_SEPARATOR.join(parts) + "\n")
            self._stream.flush()

    def finish(self) -> None:
        """Leave the line on the terminal, so that further output goes below the line."""
        if self._has_line:
            self._has_line = False
            self._stream.write("\n")
            self._stream.flush()


def _columns(stream: TextIO) -> int:
    """Return the width of the terminal that ``stream`` writes to, in characters."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
