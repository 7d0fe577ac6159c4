"""The learner's phase and the progress of its work, for heartbeats and status.

The coordinator ends a run in which nothing moves, so a long phase has to show that its work moves. `moved` counts
forward passes and gatherings of weights. Libraries write a checkpoint without a sign, so `watch_files` looks at the
sizes of the files on disk. Other work, such as loading a model, or gathering a model before its first byte is written,
shows no sign at all. Such work gets a bounded patience instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rollmesh.types import LearnerPhase, LearnerStatus, MemberReport, PolicyVersion

WITHOUT_A_SIGN = (LearnerPhase.STARTING, LearnerPhase.CHECKPOINTING)
"""Phases that may take a long time without a sign of moving."""


class PhaseTracker:
    """The learner's phase and its progress, for heartbeats and status.

    The step loop writes, the servicer and the heartbeats read. Several threads may use one tracker.

    Args:
        patience_s: seconds that a phase of `WITHOUT_A_SIGN` may go on without a sign of moving.
    """

    def __init__(self, patience_s: float) -> None:
        self._lock = threading.Lock()
        self._patience_s = patience_s
        self._call_timeout_s = 0.0
        self._phase = LearnerPhase.STARTING
        self._since = time.monotonic()
        self._num_steps = 0
        self._num_moves = 0
        self._version: PolicyVersion | None = None
        self._files: dict[str, int] = {}

    def enter(self, phase: LearnerPhase) -> None:
        """Record that ``phase`` begins."""
        with self._lock:
            self._phase, self._since = phase, time.monotonic()
            self._num_moves += 1

    def moved(self) -> None:
        """Record that a part of the phase's work is done."""
        with self._lock:
            self._num_moves += 1

    def trained(self, num_steps: int, version: PolicyVersion) -> None:
        """Record that step ``num_steps`` is trained and has made ``version``."""
        with self._lock:
            self._num_steps, self._version = num_steps, version

    @contextlib.contextmanager
    def calling(self, timeout_s: float) -> Iterator[None]:
        """Mark a call that the step loop waits for. Until its deadline, ``timeout_s``, nothing has to move."""
        with self._lock:
            self._call_timeout_s = timeout_s
        try:
            yield
        finally:
            with self._lock:
                self._call_timeout_s = 0.0

    def watch_files(self, folder: Path) -> None:
        """Look at the files of checkpoints and exports in the run's ``folder``. Changed sizes are a sign of moving.

        The call blocks while the disk blocks. It does nothing unless the learner is writing a checkpoint.
        """
        if self.status().phase is not LearnerPhase.CHECKPOINTING:
            return
        files = _sizes(folder)
        with self._lock:
            if files != self._files:
                self._files = files
                self._num_moves += 1

    def status(self) -> LearnerStatus:
        """Return the phase, its duration, and the last trained step and version."""
        with self._lock:
            return LearnerStatus(self._phase, self._num_steps, self._version, time.monotonic() - self._since)

    def report(self) -> MemberReport:
        """Return the progress of the work, for a heartbeat."""
        with self._lock:
            patience_s = self._patience_s if self._phase in WITHOUT_A_SIGN else 0.0
            return MemberReport(
                num_moves=self._num_moves, patience_s=max(patience_s, self._call_timeout_s), phase=self._phase
            )


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file of the checkpoints and exports in a run folder.

    Files that appear or disappear during the call may be missing.
    """
    sizes = {}
    for top in (folder / "checkpoints", *folder.glob("export*")):
        for path in top.rglob("*"):
            with contextlib.suppress(OSError):
                sizes[str(path)] = path.stat().st_size
    return sizes
