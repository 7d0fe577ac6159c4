"""One calm line of progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import TextIO

from rollmesh.types import MeshStatus, RunState

PLAIN_INTERVAL_S = 10.0
"""Between lines where the output is no terminal and no step has ended."""


def format_status(status: MeshStatus, expected: Sequence[str] = ()) -> str:
    """The mesh in one line of at most about 120 characters.

    Args:
        status: as the coordinator gives it.
        expected: members that were started; while the mesh is starting, those that are not up yet are named.
    """
    if status.run_state is RunState.STARTING:
        return _format_start(status, expected)
    parts = [f"step {status.step}/{status.num_steps}"]
    if "reward/mean" in status.metrics:
        parts.append(f"reward {status.metrics['reward/mean']:.3f}")
    if status.last_evaluation is not None:
        result = status.last_evaluation
        parts.append(f"pass@1 {result.pass_at_1:.3f} (v{result.version.number})")
    parts.append(f"{status.generated_tokens_per_s:,.0f} tok/s")
    if "staleness/mean" in status.metrics:
        parts.append(f"staleness {status.metrics['staleness/mean']:.2f}")
    parts.append(f"queue {status.num_groups.get('ready', 0)}")
    if num_filtered := status.num_groups.get("filtered", 0):
        parts.append(f"filtered {num_filtered}")
    parts.append(f"slots {status.num_slots_used}/{status.num_slots}")
    if status.committed_version is not None:
        parts.append(f"v{status.committed_version.number}")
    if status.waiting_for:
        parts.append(status.waiting_for)
    return " · ".join(parts)


def _format_start(status: MeshStatus, expected: Sequence[str]) -> str:
    up = [member.name for member in status.members]
    missing = [name for name in expected if name not in up]
    if missing:
        return (
            f"starting · {len(expected) - len(missing)} of {len(expected)} services up · loading {', '.join(missing)}"
        )
    parts = ["starting", f"up: {', '.join(up) or 'nobody yet'}"]
    return " · ".join([*parts, status.waiting_for] if status.waiting_for else parts)


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
        self._started = time.monotonic()
        self._last_key: tuple[object, ...] = ()
        self._last_written = float("-inf")

    def show(self, status: MeshStatus) -> None:
        line = f"{_clock(time.monotonic() - self._started)} {format_status(status, self._expected)}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + line[:width])
            self._stream.flush()
            return
        key = (status.run_state, status.step, status.last_evaluation)
        now = time.monotonic()
        if key != self._last_key or now - self._last_written > PLAIN_INTERVAL_S:
            self._last_key, self._last_written = key, now
            self._stream.write(line + "\n")
            self._stream.flush()

    def finish(self) -> None:
        """Leave the line standing and go on below it."""
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
