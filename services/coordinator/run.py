"""The state of the run, and the reason of its end.

::

    STARTING ── first version committed ──► RUNNING ── last step reported ──► FINISHING ── evaluated ──► FINISHED
        └──────────────────────────┴──────────── a failure, from any of them ────┴──► FAILED
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from rollmesh.types import PolicyVersion, RunState

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The state of the run, which the coordinator tells all members by heartbeat.

    Attributes:
        num_steps: optimiser batches in the whole run.
        committed_version: the version that serves; None before the first commit.
        committed_step: the step that made the committed version.
        step: the last reported step. At the start, and after a learner went back, the step that made the committed
            version.
        metrics: the metrics of the last reported step.
        over: set once the run is FINISHED or FAILED.
    """

    run_id: str
    num_steps: int
    state: RunState = RunState.STARTING
    failure: str = ""
    committed_version: PolicyVersion | None = None
    committed_step: int = 0
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def commit(self, version: PolicyVersion, step: int) -> None:
        """Record that a version serves now, which ``step`` made."""
        self.committed_version, self.committed_step = version, step
        if self.state is RunState.STARTING or step < self.step:  # a learner went on from a checkpoint
            self.step = step
        if self.state is RunState.STARTING:
            self._move(RunState.RUNNING)

    def report_step(self, step: int, metrics: Mapping[str, float], is_last: bool) -> None:
        """Record the learner's report of one step. Repeating a report is harmless; older steps change no metrics."""
        if step >= self.step:
            self.step, self.metrics = step, dict(metrics)
        if is_last and self.state in (RunState.STARTING, RunState.RUNNING):
            self._move(RunState.FINISHING)

    def finish(self) -> None:
        """End a FINISHING run: all for which the run waited has happened."""
        if self.state is RunState.FINISHING:
            self._move(RunState.FINISHED)

    def fail(self, reason: str) -> None:
        """End the run as FAILED. Only the first reason is kept."""
        if not self.state.is_over:
            self.failure = reason
            self._move(RunState.FAILED)

    def _move(self, state: RunState) -> None:
        level = logging.ERROR if state is RunState.FAILED else logging.INFO
        suffix = f": {self.failure}" if self.failure else ""
        logger.log(level, "run is %s%s", state.value, suffix, extra={"run_state": state.value})
        self.state = state
        if state.is_over:
            self.over.set()
