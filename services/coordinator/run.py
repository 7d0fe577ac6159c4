"""The state of the run, and what ended it.

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
    """What all members are told by heartbeat.

    Attributes:
        num_steps: optimiser batches in the whole run.
        committed_version: serves; None before the first.
        committed_step: the step that made it.
        step: the last one reported; at the start, and after a learner went back, the one that made the version.
        metrics: that step's.
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
        """A version serves now, which ``step`` made."""
        self.committed_version, self.committed_step = version, step
        if self.state is RunState.STARTING or step < self.step:  # a learner went on from a checkpoint
            self.step = step
        if self.state is RunState.STARTING:
            self._move(RunState.RUNNING)

    def report_step(self, step: int, metrics: Mapping[str, float], is_last: bool) -> None:
        """The learner's report of one step; repeating it, or an older one, is harmless."""
        if step >= self.step:
            self.step, self.metrics = step, dict(metrics)
        if is_last and self.state in (RunState.STARTING, RunState.RUNNING):
            self._move(RunState.FINISHING)

    def finish(self) -> None:
        """Everything that FINISHING waits for has happened."""
        if self.state is RunState.FINISHING:
            self._move(RunState.FINISHED)

    def fail(self, reason: str) -> None:
        """End the run; only the first reason is kept."""
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
