"""What the learner is doing and how its work moves, shared between the step loop and whoever asks.

The coordinator ends a run in which nothing moves, so a long phase has to show that it moves. Forward passes and
gathered weights are counted where they happen (`moved`). A checkpoint is written by libraries that say nothing from
inside: its bytes on disk are looked at (`watch_files`). What shows neither, such as loading a model or gathering one
before its first byte is written, has a bounded patience instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rollmesh.types import LearnerPhase, LearnerStatus, MemberReport, PolicyVersion

WITHOUT_A_SIGN = (LearnerPhase.STARTING, LearnerPhase.CHECKPOINTING)
"""Phases that may take long without a sign."""


class PhaseTracker:
    """What the step loop says and the servicer and the heartbeats answer from; safe to use from several threads.

    Args:
        patience_s: how long a phase of `WITHOUT_A_SIGN` may show nothing.
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
        """A phase begins."""
        with self._lock:
            self._phase, self._since = phase, time.monotonic()
            self._num_moves += 1

    def moved(self) -> None:
        """A piece of the phase's work is done."""
        with self._lock:
            self._num_moves += 1

    def trained(self, num_steps: int, version: PolicyVersion) -> None:
        """``num_steps`` batches are trained and made ``version``."""
        with self._lock:
            self._num_steps, self._version = num_steps, version

    @contextlib.contextmanager
    def calling(self, timeout_s: float) -> Iterator[None]:
        """A call that the loop waits for, with a deadline of its own: until then nothing has to move."""
        with self._lock:
            self._call_timeout_s = timeout_s
        try:
            yield
        finally:
            with self._lock:
                self._call_timeout_s = 0.0

    def watch_files(self, folder: Path) -> None:
        """Look at what a checkpoint or export writes under the run's ``folder``. Blocks as long as the disk does.

        Does nothing in other phases.
        """
        if self.status().phase is not LearnerPhase.CHECKPOINTING:
            return
        files = _sizes(folder)
        with self._lock:
            if files != self._files:
                self._files = files
                self._num_moves += 1

    def status(self) -> LearnerStatus:
        """What the learner is doing now."""
        with self._lock:
            return LearnerStatus(self._phase, self._num_steps, self._version, time.monotonic() - self._since)

    def report(self) -> MemberReport:
        """How the work moves, for a heartbeat."""
        with self._lock:
            patience_s = self._patience_s if self._phase in WITHOUT_A_SIGN else 0.0
            return MemberReport(
                num_moves=self._num_moves, patience_s=max(patience_s, self._call_timeout_s), phase=self._phase
            )


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each file of the checkpoints and exports in a run folder. Files that come and go meanwhile
    may be missing."""
    sizes = {}
    for top in (folder / "checkpoints", *folder.glob("export*")):
        for path in top.rglob("*"):
            with contextlib.suppress(OSError):
                sizes[str(path)] = path.stat().st_size
    return sizes
