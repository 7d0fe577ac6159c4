"""What the learner's heartbeats say: every kind of long work moves, or has a bounded patience."""

from __future__ import annotations

from pathlib import Path

from rollmesh.types import LearnerPhase
from services.learner.progress import LearnerProgress

PATIENCE_S = 1800.0


def test_training_moves_with_each_pass_and_has_no_patience() -> None:
    progress = LearnerProgress(PATIENCE_S)
    progress.enter(LearnerPhase.TRAINING)
    before = progress.report()
    progress.moved()
    after = progress.report()
    assert after.num_moves > before.num_moves
    assert (after.phase, after.patience_s) == (LearnerPhase.TRAINING, 0.0)
    assert progress.report() == after, "time alone moves nothing"


def test_a_checkpoint_moves_with_the_bytes_that_it_writes(tmp_path: Path) -> None:
    progress = LearnerProgress(PATIENCE_S)
    progress.enter(LearnerPhase.CHECKPOINTING)
    partial = tmp_path / "checkpoints" / "step-000001.partial"
    partial.mkdir(parents=True)
    seen = []
    for content in ("a", "ab", "ab"):
        (partial / "model.pt").write_text(content)
        progress.watch_files(tmp_path)
        seen.append(progress.report().num_moves)
    export = tmp_path / "export.partial"
    export.mkdir()
    (export / "model.safetensors").write_text("weights")
    progress.watch_files(tmp_path)
    seen.append(progress.report().num_moves)
    assert seen[0] < seen[1] == seen[2] < seen[3]
    assert progress.report().patience_s == PATIENCE_S


def test_files_of_others_are_no_sign(tmp_path: Path) -> None:
    progress = LearnerProgress(PATIENCE_S)
    progress.enter(LearnerPhase.CHECKPOINTING)
    before = progress.report()
    (tmp_path / "coordinator.log").write_text("a line")
    progress.watch_files(tmp_path)
    assert progress.report() == before


def test_a_call_with_a_deadline_may_take_that_long() -> None:
    progress = LearnerProgress(PATIENCE_S)
    progress.enter(LearnerPhase.PUBLISHING)
    with progress.calling(960.0):
        assert progress.report().patience_s == 960.0
    assert progress.report().patience_s == 0.0
