"""The loop: groups retire once a checkpoint covers them, and workers that join get the present version."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from rollmesh.config.shared import RunSection
from rollmesh.types import PolicyVersion
from services.learner.checkpoint import CheckpointStore
from services.learner.config import CheckpointSection, LearnerSection
from services.learner.control import Word
from services.learner.intake import NoBatch, RankShare
from services.learner.loop import Loop, LoopResources
from services.learner.phase import PhaseTracker
from services.learner.ranks import Ranks
from services.learner.start import Start
from tests.fakes.learnables import FakePolicy


class Run:
    """The resources of a loop, which trains batches without groups.

    ``before_batch`` runs while the loop waits. Before the batches of the steps in ``lacking``, a rollout worker lacks
    the version. ``words`` are what the coordinator wants after the last step.
    """

    def __init__(self, folder: Path, num_steps: int, checkpoint: CheckpointSection) -> None:
        self.policy, self.retired, self.metrics = FakePolicy(), list[int](), list[Mapping[str, float]]()
        self.before_batch: Callable[[int], None] = lambda step: None
        self.lacking: list[int] = []
        self._num_steps = num_steps
        section = LearnerSection(checkpoint=checkpoint)
        ranks = Ranks(0, 1, torch.device("cpu"))
        self.store = CheckpointStore(RunSection(name="run", directory=folder), section, "0" * 64, ranks)
        publisher = SimpleNamespace(publish=self._publish, ensure_committed=lambda *args: None, max_pause_s=0)
        self.words = deque([Word.OVER])
        self.published: list[PolicyVersion] = []
        self.reported: list[tuple[int, bool]] = []
        control = SimpleNamespace(
            check=lambda: None,
            report_step=self._report,
            num_lost_reports=0,
            attend=lambda timeout_s: self.words.popleft(),
        )
        resources = LoopResources(
            ranks=ranks,
            intake=cast(Any, self),
            trainer=cast(Any, SimpleNamespace(train=self._train, state=dict)),
            learnables=self.policy.learnables,
            publisher=cast(Any, publisher),
            checkpoints=self.store,
            tracker=PhaseTracker(1.0),
            reporter=cast(Any, control),
            metrics_file=cast(Any, SimpleNamespace(cut=lambda step: None, append=self._append)),
            recorder=None,
        )
        self.loop = Loop(checkpoint, resources, Start(), staleness_bound=1)

    def take(self, step: int, version: PolicyVersion, meanwhile: Callable[[], None]) -> RankShare | NoBatch:
        self.before_batch(step)
        meanwhile()
        if step in self.lacking:
            self.lacking.remove(step)
            return NoBatch.PUBLISH
        if step > self._num_steps:
            return NoBatch.END
        return RankShare((), ("a group",), 0, step == self._num_steps, 0.0, 0.0)

    def mark_trained(self, step: int) -> None:
        pass

    def make_durable(self) -> None:
        pass

    def retire(self, through_step: int) -> None:
        assert through_step in self.store.steps()
        self.retired.append(through_step)

    def _train(self, *args: object) -> SimpleNamespace:
        self.policy.weights += 1
        return SimpleNamespace(metrics={"reward/mean": 0.0}, staleness_histogram={})

    def _publish(self, version: PolicyVersion, step: int, must_commit: bool = False) -> None:
        self.published.append(version)

    def _report(self, step: int, version: PolicyVersion, metrics: object, is_last: bool = False) -> None:
        self.reported.append((step, is_last))

    def _append(self, step: int, version: object, histogram: object, metrics: Mapping[str, float]) -> None:
        self.metrics.append(metrics)


def test_groups_retire_while_a_batch_is_awaited_once_the_slow_disk_has_the_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, 4, CheckpointSection(every_steps=2))
    seen: dict[int, list[int]] = {}

    def before_batch(step: int) -> None:
        seen[step] = list(run.retired)
        if step == 2:
            run.policy.may_write.clear()
        if step == 4:
            run.policy.may_write.set()
            run.store.wait()

    run.before_batch = before_batch
    run.loop.run()
    assert seen == {1: [], 2: [], 3: [], 4: []}
    assert run.retired[0] == 2
    assert run.retired[-1] == 4
    pauses = [metrics.get("time/checkpoint_pause_s") for metrics in run.metrics]
    assert [pause is not None for pause in pauses] == [False, False, True, False]
    assert [step for step, metrics in enumerate(run.metrics, 1) if "time/checkpoint_s" in metrics] == [4]


def test_the_last_checkpoint_is_waited_for_and_holds_the_last_weights(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, CheckpointSection(every_steps=2))
    assert run.loop.run() == 3
    assert run.store.steps() == [2, 3]
    policy = FakePolicy()
    run.store.load(policy.learnables, 2)
    assert policy.weights.tolist() == [2] * 4
    run.store.load(policy.learnables, 3)
    assert policy.weights.tolist() == [3] * 4
    assert (tmp_path / "run" / "export" / "model.pt").exists()
    assert run.retired[-1] == 3


def test_a_worker_that_joins_gets_the_present_version_before_the_next_batch_and_after_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, CheckpointSection())
    run.lacking = [2]
    run.words = deque([Word.NONE, Word.PUBLISH, Word.OVER])
    assert run.loop.run() == 2
    assert [version.number for version in run.published] == [0, 1, 1, 2, 2]
    assert run.reported == [(1, False), (2, False), (2, True)], "the run ends once"
