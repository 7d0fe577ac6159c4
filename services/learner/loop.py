"""The learner's step, read top to bottom.

::

    take a batch ─► check the bound ─► train ─► mark trained ─► publish ─► report ─► maybe checkpoint, then retire
      waits for rollout               all ranks                waits for    to the      all ranks
      (commits in Redis)                                       the engines  coordinator

Every rank runs the same loop; what is rank 0's alone is inside the parts. The loop waits only for a batch and for the
publish protocol, and rank 0 looks while it waits whether the run still goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rollmesh.types import LearnerPhase, PolicyVersion
from services.config import MeshConfig
from services.learner.bound import check_staleness, staleness_window
from services.learner.checkpoint import CheckpointStore, Learnables
from services.learner.intake import Intake, Share
from services.learner.metrics import MetricsFile, StepStatistics
from services.learner.progress import LearnerProgress
from services.learner.publisher import Publisher
from services.learner.recording import record_batch
from services.learner.start import Start
from services.learner.trainer import Trainer

_logger = logging.getLogger(__name__)


NUM_FILTERED, ELAPSED_S = "num_filtered", "elapsed_s"
"""Names of the loop's numbers in a checkpoint: groups FILTERED in the run so far, and seconds since its start."""


class Reporter(Protocol):
    """What the loop needs of `services.learner.control.Control`."""

    @property
    def num_lost_reports(self) -> int:
        """Reports that did not arrive."""
        ...

    def report_step(
        self, step: int, version: PolicyVersion, metrics: Mapping[str, float], *, is_last: bool = False
    ) -> None:
        """Tells the coordinator about a step."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a step is made of. ``reporter`` and ``metrics_file`` are None on ranks other than 0."""

    intake: Intake
    trainer: Trainer
    learnables: Learnables
    publisher: Publisher
    checkpoints: CheckpointStore
    progress: LearnerProgress
    reporter: Reporter | None
    metrics_file: MetricsFile | None


class Loop:
    """The steps of a run, from the first version to the last checkpoint.

    Args:
        config: the mesh's configuration.
        parts: what a step is made of.
        start: where the run begins or goes on.
    """

    def __init__(self, config: MeshConfig, parts: Parts, start: Start) -> None:
        self._config = config
        self._parts = parts
        self._bound = staleness_window(config).bound
        self._first_step = start.step
        self._version = start.version
        self._metrics: Mapping[str, float] = {}
        self._num_filtered = int(start.state.get(NUM_FILTERED, 0))
        self._saved_step = start.step or -1
        self._started = time.monotonic() - start.state.get(ELAPSED_S, 0.0)
        if parts.metrics_file is not None:
            parts.metrics_file.cut(start.step)

    def run(self) -> int:
        """Train until nothing is left. Returns the number of the last step.

        Raises:
            RollMeshError: the run cannot go on; the message says why.
        """
        parts = self._parts
        parts.progress.enter(LearnerPhase.PUBLISHING)
        step, is_last = self._first_step, False
        parts.publisher.publish(self._version, step, must_commit=True)
        while not is_last:
            parts.progress.enter(LearnerPhase.WAITING_FOR_BATCH)
            share = parts.intake.take(step + 1, self._version)
            if share is None:
                break
            step, is_last = step + 1, share.is_last
            self._step(step, share)
            if not is_last and self._is_checkpoint_due(step):
                self._checkpoint(step, is_last=False)
            elif self._config.learner.checkpoint.every_steps is None:
                parts.intake.retire(step)  # no checkpoint comes to which a learner could go back before this step
        self._finish(step)
        return step

    def _step(self, step: int, share: Share) -> None:
        parts = self._parts
        step_started = time.monotonic() - share.wait_s - share.read_s
        parts.progress.enter(LearnerPhase.TRAINING)
        check_staleness(share.groups, self._version, self._bound)
        if self._config.learner.should_record_batches and parts.reporter is not None:
            record_batch(self._config.run.folder / "batches", step, parts.intake.read(share.batch_ids))
        statistics = parts.trainer.train(share.parts, step, self._version.number)
        parts.intake.mark_trained(step)
        self._version = self._version.next()
        parts.progress.trained(step, self._version)

        parts.progress.enter(LearnerPhase.PUBLISHING)
        publish_started = time.monotonic()
        parts.publisher.publish(self._version, step)
        now = time.monotonic()
        timings = {
            "time/wait_s": share.wait_s,
            "time/intake_s": share.read_s,
            "time/publish_s": now - publish_started,
            "time/pause_s": parts.publisher.max_pause_s,
            "time/step_s": now - step_started,
            "time/since_start_s": now - self._started,
        }
        self._report(step, statistics, {**statistics.metrics, "filter/pass_rate": self._pass_rate(share), **timings})

    def _pass_rate(self, share: Share) -> float:
        """What part of the batch's groups and of those filtered since the batch before it is in the batch."""
        num_groups = len(share.batch_ids)
        num_filtered, self._num_filtered = share.num_filtered - self._num_filtered, share.num_filtered
        return num_groups / (num_groups + num_filtered)

    def _report(self, step: int, statistics: StepStatistics, metrics: Mapping[str, float]) -> None:
        if self._parts.reporter is not None:
            metrics = {**metrics, "report/lost": float(self._parts.reporter.num_lost_reports)}
        self._metrics = metrics
        if self._parts.metrics_file is not None:
            self._parts.metrics_file.append(step, self._version, statistics.staleness_histogram, metrics)
        if self._parts.reporter is not None:
            self._parts.reporter.report_step(step, self._version, metrics)
            _logger.info(
                "step %d: reward %.3f, %.1f s",
                step,
                metrics["reward/mean"],
                metrics["time/step_s"],
                extra={"step": step},
            )

    def _is_checkpoint_due(self, step: int) -> bool:
        every = self._config.learner.checkpoint.every_steps
        return every is not None and step % every == 0

    def _checkpoint(self, step: int, is_last: bool) -> None:
        """Checkpoint and export; the groups retire once both are durable."""
        parts = self._parts
        parts.progress.enter(LearnerPhase.CHECKPOINTING)
        if step != self._saved_step:  # saved already where nothing was trained after the last one that was due
            parts.intake.make_durable()
            parts.checkpoints.save(parts.learnables, self._state(), step, self._version)
            self._saved_step = step
        if self._config.learner.checkpoint.should_export:
            parts.checkpoints.export(parts.learnables, step, is_last)
        parts.intake.retire(step)

    def _state(self) -> Mapping[str, float]:
        """The numbers that a run goes on with."""
        elapsed_s = time.monotonic() - self._started
        return {**self._parts.trainer.state(), NUM_FILTERED: float(self._num_filtered), ELAPSED_S: elapsed_s}

    def _finish(self, step: int) -> None:
        """The last version serves, the last checkpoint is durable, and then the coordinator hears of the end."""
        parts = self._parts
        parts.progress.enter(LearnerPhase.PUBLISHING)
        parts.publisher.ensure_committed(self._version, step)
        self._checkpoint(step, is_last=True)
        if parts.reporter is not None:
            parts.reporter.report_step(step, self._version, self._metrics, is_last=True)
        parts.progress.enter(LearnerPhase.FINISHED)
