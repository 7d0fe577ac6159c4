"""The learner's heartbeats: every kind of long work shows that it moves, or has a bounded patience."""

from __future__ import annotations

from pathlib import Path

from rollmesh.types import LearnerPhase
from services.learner.phase import PhaseTracker

PATIENCE_S = 1800.0


def test_training_moves_with_each_pass_and_has_no_patience() -> None:
    tracker = PhaseTracker(PATIENCE_S)
    tracker.enter(LearnerPhase.TRAINING)
    before = tracker.report()
    tracker.moved()
    after = tracker.report()
    assert after.num_moves > before.num_moves
    assert (after.phase, after.patience_s) == (LearnerPhase.TRAINING, 0.0)
    assert tracker.report() == after, "time alone moves nothing"


def test_a_checkpoint_moves_with_the_bytes_that_it_writes(tmp_path: Path) -> None:
    tracker = PhaseTracker(PATIENCE_S)
    tracker.enter(LearnerPhase.CHECKPOINTING)
    partial = tmp_path / "checkpoints" / "step-000001.partial"
    partial.mkdir(parents=True)
    seen = []
    for content in ("a", "ab", "ab"):
        (partial / "model.pt").write_text(content)
        tracker.watch_files(tmp_path)
        seen.append(tracker.report().num_moves)
    export = tmp_path / "export.partial"
    export.mkdir()
    (export / "model.safetensors").write_text("weights")
    tracker.watch_files(tmp_path)
    seen.append(tracker.report().num_moves)
    assert seen[0] < seen[1] == seen[2] < seen[3]
    assert tracker.report().patience_s == PATIENCE_S


def test_files_of_others_are_no_sign(tmp_path: Path) -> None:
    tracker = PhaseTracker(PATIENCE_S)
    tracker.enter(LearnerPhase.CHECKPOINTING)
    before = tracker.report()
    (tmp_path / "coordinator.log").write_text("a line")
    tracker.watch_files(tmp_path)
    assert tracker.report() == before


def test_a_call_with_a_deadline_may_take_that_long() -> None:
    tracker = PhaseTracker(PATIENCE_S)
    tracker.enter(LearnerPhase.PUBLISHING)
    with tracker.calling(960.0):
        assert tracker.report().patience_s == 960.0
    assert tracker.report().patience_s == 0.0
