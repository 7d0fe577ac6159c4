"""The best evaluated step of a run."""

from __future__ import annotations

from pathlib import Path

from rollmesh.telemetry.evaluations import best_step, read_scores


def test_scores_are_read_by_step_and_a_missing_file_or_metric_gives_none(tmp_path: Path) -> None:
    assert read_scores(tmp_path, "pass_at_1") == {}
    lines = ['{"step": 0, "pass_at_1": 0, "version": "0.0"}', '{"step": 4, "pass_at_1": 0.5}', '{"step": 8, "pa']
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines))
    assert read_scores(tmp_path, "pass_at_1") == {0: 0.0, 4: 0.5}
    assert read_scores(tmp_path, "version") == {}
    assert read_scores(tmp_path, "absent") == {}


def test_of_equal_scores_the_latest_is_the_best() -> None:
    scores = {10: 0.5, 20: 0.7, 30: 0.7}
    assert best_step(scores, is_highest_best=True) == 30
    assert best_step(scores, is_highest_best=False) == 10
    assert best_step({}, is_highest_best=True) is None
