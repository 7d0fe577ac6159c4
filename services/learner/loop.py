"""The loop of the learner: the parts of one step, in their order.

::

    take a batch ─► check the bound ─► train ─► mark trained ─► publish ─► report ─► maybe begin a checkpoint
      waits for rollout               all ranks                waits for    to the      all ranks; it is written
      (commits in Redis)                                       the engines  coordinator  beside the next steps

Once a checkpoint is complete, the groups of its steps retire: before the next step, or while a batch is awaited.

Every rank runs the same loop. Work for rank 0 alone is hidden in the resources: on the other ranks their methods do
nothing. The loop waits only for a batch, for the publish protocol, and for the checkpoint before. While rank 0 waits
for a batch, it checks that the run still goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rollmesh.types import LearnerPhase
from services.learner.checkpoint import CheckpointStore, Learnables
from services.learner.config import CheckpointSection
from services.learner.control import Control, Word
from services.learner.intake import Intake, NoBatch, RankShare, check_staleness
from services.learner.metrics import MetricsFile, StepStatistics
from services.learner.phase import PhaseTracker
from services.learner.publisher import Publisher
from services.learner.ranks import Ranks
from services.learner.recorder import BatchRecorder
from services.learner.start import Start
from services.learner.trainer import Trainer

_logger = logging.getLogger(__name__)


ATTEND_S = 10.0
"""Time after which the ranks begin a new wait for the end of the run, so that no collective times out."""
NUM_FILTERED, ELAPSED_S = "num_filtered", "elapsed_s"
"""Names of the loop's numbers in a checkpoint: groups FILTERED so far in the run, and seconds since the run began."""


@dataclass(frozen=True)
class LoopResources:
    """The objects that the loop uses. ``reporter``, ``metrics_file`` and ``recorder`` are None on ranks other than 0.

    ``recorder`` is None as well where batches are not recorded.
    """

    ranks: Ranks
    intake: Intake
    trainer: Trainer
    learnables: Learnables
    publisher: Publisher
    checkpoints: CheckpointStore
    tracker: PhaseTracker
    reporter: Control | None
    metrics_file: MetricsFile | None
    recorder: BatchRecorder | None


class Loop:
    """The steps of a run, from the first version to the last checkpoint.

    Args:
        checkpoint: the settings that say when checkpoints and exports are written.
        resources: the objects that the loop uses.
        start: the state before the first step of this process.
        staleness_bound: the largest staleness that a trained sample may have, in versions.
    """

    def __init__(
        self,
        checkpoint: CheckpointSection,
        resources: LoopResources,
        start: Start,
        *,
        staleness_bound: int,
    ) -> None:
        self._checkpoint_section = checkpoint
        self._resources = resources
        self._bound = staleness_bound
        self._first_step = start.step
        self._version = start.version
        self._metrics: Mapping[str, float] = {}
        self._checkpoint_timings: dict[str, float] = {}
        self._num_filtered = int(start.state.get(NUM_FILTERED, 0))
        self._saved_step = start.step or -1
        self._started = time.monotonic() - start.state.get(ELAPSED_S, 0.0)
        if resources.metrics_file is not None:
            resources.metrics_file.cut(start.step)
        if resources.recorder is not None:
            resources.recorder.cut(start.step)

    def run(self) -> int:
        """Train until no batch is left, and wait for the end of the run. Return the number of the last step.

        Raises:
            RollMeshError: the run cannot go on; the message says why.
        """
        resources = self._resources
        resources.tracker.enter(LearnerPhase.PUBLISHING)
        step, is_last = self._first_step, False
        resources.publisher.publish(self._version, step, must_commit=True)
        while not is_last:
            resources.tracker.enter(LearnerPhase.WAITING_FOR_BATCH)
            share = resources.intake.take(step + 1, self._version, self._retire_covered)
            if share is NoBatch.PUBLISH:
                self._publish_again(step)
                continue
            if share is NoBatch.END:
                break
            step, is_last = step + 1, share.is_last
            self._step(step, share)
            self._retire_covered()
            if not is_last and resources.checkpoints.is_due(step):
                self._checkpoint(step, is_last=False)
            elif self._checkpoint_section.is_only_last:
                resources.intake.retire(step)  # no checkpoint comes that a learner could go back to
        self._finish(step)
        self._attend(step)
        return step

    def _step(self, step: int, share: RankShare) -> None:
        resources = self._resources
        step_started = time.monotonic() - share.wait_s - share.read_s
        resources.tracker.enter(LearnerPhase.TRAINING)
        check_staleness(share.groups, self._version, self._bound)
        if resources.recorder is not None:
            resources.recorder.record(step, self._version, resources.intake.read(share.batch_ids))
        statistics = resources.trainer.train(share.groups_by_step, step, self._version.number)
        resources.intake.mark_trained(step)
        self._version = self._version.next()
        resources.tracker.trained(step, self._version)

        resources.tracker.enter(LearnerPhase.PUBLISHING)
        publish_started = time.monotonic()
        resources.publisher.publish(self._version, step)
        now = time.monotonic()
        timings = {
            "time/wait_s": share.wait_s,
            "time/intake_s": share.read_s,
            "time/publish_s": now - publish_started,
            "time/pause_s": resources.publisher.max_pause_s,
            "time/step_s": now - step_started,
            "time/since_start_s": now - self._started,
            **self._checkpoint_timings,
        }
        self._checkpoint_timings = {}
        self._report(step, statistics, {**statistics.metrics, "filter/pass_rate": self._pass_rate(share), **timings})

    def _pass_rate(self, share: RankShare) -> float:
        """Return the share of groups that passed the filter since the batch before.

        A batch of 32 groups, and 8 groups FILTERED since the batch before, give 32 / (32 + 8) = 0.8.
        """
        num_groups = len(share.batch_ids)
        num_filtered, self._num_filtered = share.num_filtered - self._num_filtered, share.num_filtered
        return num_groups / (num_groups + num_filtered)

    def _report(self, step: int, statistics: StepStatistics, metrics: Mapping[str, float]) -> None:
        if self._resources.reporter is not None:
            metrics = {**metrics, "report/lost": float(self._resources.reporter.num_lost_reports)}
        self._metrics = metrics
        if self._resources.metrics_file is not None:
            self._resources.metrics_file.append(step, self._version, statistics.staleness_histogram, metrics)
        if self._resources.reporter is not None:
            self._resources.reporter.report_step(step, self._version, metrics)
            _logger.info(
                "step %d: reward %.3f, %.1f s",
                step,
                metrics["reward/mean"],
                metrics["time/step_s"],
                extra={"step": step},
            )

    def _checkpoint(self, step: int, is_last: bool) -> None:
        """Begin a checkpoint, and an export if the settings ask for one. The last checkpoint is also waited for."""
        resources, started = self._resources, time.monotonic()
        resources.tracker.enter(LearnerPhase.CHECKPOINTING)
        self._wait_for_checkpoint()  # at most one is being written, so that main memory holds at most one copy
        if step != self._saved_step:  # equal at the end, if the last step began or loaded its checkpoint already
            resources.intake.make_durable()
            resources.checkpoints.save(resources.learnables, self._state(), step, self._version, is_last=is_last)
            self._saved_step = step
        elif self._checkpoint_section.should_export:
            resources.checkpoints.export(resources.learnables, step, is_last=is_last)
        if is_last:
            self._wait_for_checkpoint()
            resources.intake.retire(step)
        self._checkpoint_timings["time/checkpoint_pause_s"] = time.monotonic() - started

    def _wait_for_checkpoint(self) -> None:
        reporter = self._resources.reporter
        self._resources.checkpoints.wait(reporter.check if reporter is not None else lambda: None)
        self._retire_covered()

    def _retire_covered(self) -> None:
        """Retire the groups of the steps that a checkpoint has come to cover.

        Raises:
            ConfigError: the checkpoint could not be written.
        """
        saved = self._resources.checkpoints.take_saved()
        if saved is not None:
            self._resources.intake.retire(saved.step)
            self._checkpoint_timings["time/checkpoint_s"] = saved.write_s
            _logger.info("the checkpoint of step %d is complete after %.2f s", saved.step, saved.write_s)

    def _state(self) -> Mapping[str, float]:
        """Return the numbers for a checkpoint, with which a resumed run goes on."""
        elapsed_s = time.monotonic() - self._started
        return {**self._resources.trainer.state(), NUM_FILTERED: float(self._num_filtered), ELAPSED_S: elapsed_s}

    def _finish(self, step: int) -> None:
        """Commit the last version, write the last checkpoint, and then tell the coordinator that the run has ended."""
        resources = self._resources
        resources.tracker.enter(LearnerPhase.PUBLISHING)
        resources.publisher.ensure_committed(self._version, step)
        self._checkpoint(step, is_last=True)
        if resources.reporter is not None:
            resources.reporter.report_step(step, self._version, self._metrics, is_last=True)

    def _attend(self, step: int) -> None:
        """Wait until the run is over. Meanwhile bring the last version to rollout workers that join: they evaluate it.

        Raises:
            RunEndedError: the run failed (rank 0).
        """
        ranks, reporter = self._resources.ranks, self._resources.reporter
        word = Word.NONE
        self._resources.tracker.enter(LearnerPhase.FINISHED)
        while word is not Word.OVER:
            word = Word(ranks.broadcast_bytes(None if reporter is None else reporter.attend(ATTEND_S).value))
            if word is Word.PUBLISH:
                self._publish_again(step)
                self._resources.tracker.enter(LearnerPhase.FINISHED)

    def _publish_again(self, step: int) -> None:
        """Publish the present version for the rollout workers that lack it."""
        self._resources.tracker.enter(LearnerPhase.PUBLISHING)
        self._resources.publisher.publish(self._version, step)
