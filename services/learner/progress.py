"""What the learner is doing, shared between the step loop and whoever asks."""

from __future__ import annotations

import threading
import time

from rollmesh.types import LearnerPhase, LearnerStatus, PolicyVersion


class LearnerProgress:
    """What the step loop says and the servicer answers; safe to use from both threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = LearnerPhase.STARTING
        self._since = time.monotonic()
        self._num_steps = 0
        self._version: PolicyVersion | None = None

    def enter(self, phase: LearnerPhase) -> None:
        """A phase begins."""
        with self._lock:
            self._phase, self._since = phase, time.monotonic()

    def trained(self, num_steps: int, version: PolicyVersion) -> None:
        """``num_steps`` batches are trained and made ``version``."""
        with self._lock:
            self._num_steps, self._version = num_steps, version

    def status(self) -> LearnerStatus:
        """What the learner is doing now."""
        with self._lock:
            return LearnerStatus(self._phase, self._num_steps, self._version, time.monotonic() - self._since)
