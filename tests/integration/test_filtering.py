"""Whole meshes that filter: the groups that are trained, and the end of a run that has no more data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollmesh.replay.recording import load_recorded
from rollmesh.types import Group
from tests.integration.mesh_runs import MeshRun, processes_of, run_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(600)]

BATCH = 8
SCORES = (0.25, 0.5, 0.75, 0.6)
"""The score of a prompt, by its label modulo 4. The first and the third score lie at the limits of the range below, and
so outside the range."""
REWARD_FUNCTION = f"""
def reward_func(queries, prompts, labels):
    rewards = [float(len(query) % 3) for query in queries]
    return {{"rewards": rewards, "scores": [{SCORES}[int(label) % 4] for label in labels]}}
"""
SETTINGS = [
    f"training.prompts_per_step={BATCH}",
    "training.samples_per_prompt=4",
    "training.steps=20",
    "evaluation.every_steps=1000",
    "learner.should_record_batches=true",
    "learner.checkpoint.every_steps=1",
]


def _num_kept(demo: Path, num_rows: int) -> int:
    rows = (demo / "data" / "train.jsonl").read_text().splitlines()[:num_rows]
    return sum(SCORES[int(json.loads(row)["label"]) % 4] in (0.5, 0.6) for row in rows)


def _num_rows(demo: Path) -> int:
    """Return a number of rows with which the kept groups do not fill their last batch."""
    return next(count for count in range(60, 100) if _num_kept(demo, count) % BATCH in (2, 3, 4, 5))


@pytest.fixture(scope="module")
def filtered(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> MeshRun:
    """Run an asynchronous mesh whose scores depend on the prompt alone. About half of the groups are filtered."""
    folder = tmp_path_factory.mktemp("filtered")
    (folder / "reward_func.py").write_text(REWARD_FUNCTION)
    settings = [
        f"reward.function={folder / 'reward_func.py'}",
        f"data.max_samples={_num_rows(demo)}",
        "algorithm.filter.score_range=[0.25, 0.75]",
    ]
    return run_mesh(demo, folder, "filtered", [*SETTINGS, *settings])


@pytest.fixture(scope="module")
def emptied(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> MeshRun:
    """Run a mesh in which no group can pass the filter."""
    settings = ["data.max_samples=20", "training.epochs=2", "algorithm.filter.score_range=[2, 3]"]
    return run_mesh(demo, tmp_path_factory.mktemp("emptied"), "emptied", [*SETTINGS, *settings])


def _batches(run: MeshRun) -> list[list[Group]]:
    paths = sorted((run.folder / "batches").glob("step-*.msgpack"))
    return [load_recorded(path)[1] for path in paths]


def test_the_accounting_closes_and_the_pass_rate_is_in_it(filtered: MeshRun, demo: Path) -> None:
    books, num_rows = filtered.accounting, _num_rows(demo)
    counts = books["num_groups"]
    kept = _num_kept(demo, num_rows)
    assert books["num_opened"] == num_rows
    assert (books["num_trained"], counts["filtered"], counts["failed"]) == (kept, num_rows - kept, 0)
    assert books["is_balanced"]
    assert books["pass_rate"] == kept / num_rows
    assert set(books["reasons"]) == {"mean score 0.25 is not above 0.25", "mean score 0.75 is not below 0.75"}
    assert sum(books["reasons"].values()) == counts["filtered"]


def test_each_group_inside_the_range_is_trained_once_and_no_other(filtered: MeshRun, demo: Path) -> None:
    groups = [group for batch in _batches(filtered) for group in batch]
    assert len(groups) == len({group.prompt_id for group in groups}) == _num_kept(demo, _num_rows(demo))
    for group in groups:
        scores = [sample.score.score for sample in group.samples if sample.score]
        assert len(scores) == 4
        assert 0.25 < sum(scores) / 4 < 0.75


def test_all_batches_are_full_but_the_last_one_which_takes_what_is_left(filtered: MeshRun, demo: Path) -> None:
    kept = _num_kept(demo, _num_rows(demo))
    assert [len(batch) for batch in _batches(filtered)] == [BATCH] * (kept // BATCH) + [kept % BATCH]
    steps = [line["step"] for line in filtered.lines("metrics.jsonl")]
    assert steps == list(range(1, kept // BATCH + 2))


def test_the_pass_rate_of_each_step_is_in_the_metrics(filtered: MeshRun, demo: Path) -> None:
    sizes = [len(batch) for batch in _batches(filtered)]
    rates = [line["filter/pass_rate"] for line in filtered.lines("metrics.jsonl")]
    assert all(0 < rate <= 1 for rate in rates)
    num_filtered = sum(size / rate - size for size, rate in zip(sizes, rates, strict=True))
    assert 0 < round(num_filtered) <= filtered.accounting["num_groups"]["filtered"]


def test_the_run_says_that_the_prompts_were_used_up(filtered: MeshRun, demo: Path) -> None:
    num_rows, kept = _num_rows(demo), _num_kept(demo, _num_rows(demo))
    sentence = (
        f"the prompts were used up after {kept // BATCH + 1} of 20 steps: of {num_rows}, {kept} were trained, "
        f"{num_rows - kept} filtered and 0 failed"
    )
    assert f"warning: {sentence}" in filtered.output
    assert sentence in (filtered.folder / "report.md").read_text()
    assert "· filtered " in filtered.output


def test_evaluation_groups_are_not_filtered(filtered: MeshRun, emptied: MeshRun) -> None:
    for run in (filtered, emptied):
        evaluations = run.lines("evaluations.jsonl")
        assert [(each["num_prompts"], each["num_failed"]) for each in evaluations] == [(64, 0)] * len(evaluations)
        assert evaluations[0]["version"] == "0.0"


def test_a_run_in_which_every_group_is_filtered_ends_with_its_epochs_and_says_so(emptied: MeshRun) -> None:
    books = emptied.accounting
    assert (books["num_opened"], books["num_groups"]["filtered"], books["pass_rate"]) == (40, 40, 0.0)
    assert books["is_balanced"]
    assert "of 40, 0 were trained, 40 filtered and 0 failed; accounting.json has the reasons" in emptied.output
    assert all(" is not above 2" in reason for reason in books["reasons"])
    assert not (emptied.folder / "metrics.jsonl").exists()
    assert (emptied.folder / "export" / "config.json").exists()
    assert processes_of(emptied.folder) == []
