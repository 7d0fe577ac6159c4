"""One calm line of progress, the most important words first."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TextIO

from rollmesh.types import MeshStatus, RunState

PLAIN_INTERVAL_S = 10.0
"""Between lines where the output is no terminal and no step has ended."""
USUAL_COLUMNS = 80
"""Of a terminal that does not say how wide it is."""
_SEPARATOR = " · "


def format_status(status: MeshStatus, expected: Sequence[str] = ()) -> str:
    """The mesh in one line, of any length.

    Args:
        status: as the coordinator gives it.
        expected: members that were started; while the mesh is starting, those that are not up yet are named.
    """
    return _SEPARATOR.join(_parts(status, expected))


def fit(parts: Sequence[str], columns: int) -> str:
    """As many of ``parts``, from the first on, as ``columns`` hold; a part that does not fit is left out whole.

    Where not even the second part fits, that one is cut: it says who waits for whom.
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
    """What there is to say, the most important first."""
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
    """Rewrites one line on a terminal; elsewhere writes a line when a step has ended, and now and then.

    Args:
        stream: where to.
        expected: members that were started.
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
        """Leave the line standing and go on below it."""
        if self._has_line:
            self._has_line = False
            self._stream.write("\n")
            self._stream.flush()


def _columns(stream: TextIO) -> int:
    """How wide the terminal is that ``stream`` writes to."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
