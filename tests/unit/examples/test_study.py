"""The studies: every run is a valid mesh, and what is reported of runs is what they left behind."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rollmesh.config import load_yaml, validate
from services.config import MeshConfig

sys.path.insert(0, str(Path("examples").resolve()))
from study import GRID, HERE, STUDIES
from study_report import Grid, Outcome, grid_table, is_complete, read_outcome, read_outcomes, table, write_outcomes

SMALL = Grid(tables=("lr 1",), columns=("age 0", "age 4"), rows=("kept", "lost"))
OUTCOME = Outcome("kept, age 0, lr 1", 1, [0, 20], [0.2, 0.5], [0.25, 0.75], {0: 8, 1: 24})


def leave_behind(run: Path, last_step: int) -> None:
    run.mkdir()
    (run / "report.md").write_text("", encoding="utf-8")
    evaluations = [{"step": 0, "pass_at_1": 0.2}, {"step": last_step, "pass_at_1": 0.5}]
    steps = [
        {"step": 1, "reward/mean": 0.25, "staleness_histogram": {"0": 8, "1": 8}},
        {"step": 2, "reward/mean": 0.75, "staleness_histogram": {"1": 16}},
    ]
    for name, lines in (("evaluations.jsonl", evaluations), ("metrics.jsonl", steps)):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_is_a_mesh_that_may_start(name: str) -> None:
    study = STUDIES[name]
    variants = study.variants()
    assert len({variant.slug for variant in variants}) == len(variants)
    for variant in variants:
        validate(MeshConfig, load_yaml(HERE / study.mesh_file, variant.settings))


def test_the_objectives_are_compared_at_every_staleness_and_learning_rate() -> None:
    assert len(GRID.labels()) == len(STUDIES["objectives"].variants()) == 2 * 4 * 5


def test_a_run_is_complete_once_it_has_reported_and_was_evaluated_after_its_last_step(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "run", 20)
    leave_behind(tmp_path / "run", last_step=20)
    assert is_complete(tmp_path / "run", 20)
    assert not is_complete(tmp_path / "run", 40)
    (tmp_path / "run" / "report.md").unlink()
    assert not is_complete(tmp_path / "run", 20)


def test_an_outcome_is_read_from_a_run_and_back_from_its_file(tmp_path: Path) -> None:
    leave_behind(tmp_path / "run", last_step=20)
    outcome = read_outcome(tmp_path / "run", "kept, age 0, lr 1", 1)
    assert outcome == OUTCOME

    write_outcomes([outcome, outcome], tmp_path / "outcomes.jsonl")
    assert read_outcomes(tmp_path / "outcomes.jsonl") == [OUTCOME, OUTCOME]


def test_a_table_gives_mean_and_standard_error_over_seeds_and_how_old_samples_were() -> None:
    text = table([OUTCOME, replace(OUTCOME, seed=2, pass_at_1=[0.2, 0.7])])
    assert "| kept, age 0, lr 1 | 0.200 ± 0.000 | 0.600 ± 0.100 | 0.500, 0.700 | 0: 25.0%, 1: 75.0% |" in text


def test_a_grid_says_which_runs_fell_below_their_beginning_and_which_are_missing() -> None:
    lost = [
        Outcome("lost, age 4, lr 1", seed, [0, 20], [0.2, last], [0.2], {4: 8}) for seed, last in ((1, 0.1), (2, 0.3))
    ]
    lines = grid_table([OUTCOME, *lost], SMALL).splitlines()
    assert "| lr 1 | age 0 | age 4 |" in lines
    assert "| lost | - | 0.200 ± 0.100 (1 of 2 collapsed) |" in lines
    assert "| age 4 | 4: 100.0% |" in lines
