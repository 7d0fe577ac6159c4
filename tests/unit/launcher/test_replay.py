"""A replay starts where it can, has a part for each change of the settings, and names the first difference."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError, ReplayError
from rollmesh.replay.recording import RecordedStep, record_batch
from services.config import dump_mesh, load_mesh
from services.launcher.replay import ReplayResult, replay_run, verdict
from services.launcher.replay_comparison import Difference, compare_export, compare_step
from services.launcher.replay_plan import check_once, choose_steps, plan_replay
from tests.unit.learner.samples import mesh_config, random_groups

RECORDED = list(range(1, 10))


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ((None, None), range(1, 10)),
        ((5, 7), range(4, 8)),
        ((4, None), range(4, 10)),
        ((2, 7), range(1, 8)),
        ((None, 2), range(1, 3)),
    ],
)
def test_a_replay_starts_after_the_newest_checkpoint_before_its_first_step(
    asked: tuple[int | None, int | None], steps: range
) -> None:
    assert choose_steps(RECORDED, [3, 8], asked) == steps


@pytest.mark.parametrize(
    ("recorded", "saved", "asked", "problem"),
    [
        ([], [3], (None, None), "should_record_batches"),
        (RECORDED, [], (5, 3), "5:3 is not among the recorded steps 1 to 9"),
        (RECORDED, [], (5, 12), "5:12 is not among"),
        ([5, 6, 7], [], (None, None), "needs step 1, which is not recorded; .* is the initial model"),
        ([5, 6, 7], [3, 5], (5, 7), "needs step 4.*checkpoint of step 3; begin with a step after a checkpoint: 6"),
        ([1, 2, 4], [], (None, None), "needs step 3"),
    ],
)
def test_steps_that_cannot_be_repeated_are_refused_with_the_reason(
    recorded: list[int], saved: list[int], asked: tuple[int | None, int | None], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        choose_steps(recorded, saved, asked)


def test_a_group_that_was_trained_twice_is_named() -> None:
    check_once({1: ["a", "b"], 2: ["c"]})
    with pytest.raises(ReplayError, match="group b stands in the batches of step 1 and step 3"):
        check_once({1: ["a", "b"], 3: ["b"]})


def _run(tmp_path: Path) -> Path:
    """Return a run folder with four recorded steps; the learning rate changed after step 2."""
    run = tmp_path / "run"
    for step in (1, 2, 3, 4):
        config = mesh_config(tmp_path / "model", tmp_path, learner={"optimizer": {"lr": 1e-3 if step < 3 else 1e-4}})
        facts = RecordedStep(step, f"0.{step - 1}", 1, 4, dump_mesh(config))
        record_batch(run / "batches", facts, random_groups(1, 2, first_prompt=step))
    (run / "mesh.yaml").write_text(dump_mesh(config))
    return run


def test_a_replay_starts_anew_where_the_settings_of_the_run_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_replay(_run(tmp_path), out, (None, None), ["learner.num_threads=2"])
    bounds = [(part.first, part.last, part.start, part.is_last) for part in plan.parts]
    assert bounds == [(1, 2, "", False), (3, 4, str(out), True)]
    settings = [load_mesh(Path(part.settings)).learner for part in plan.parts]
    assert [section.optimizer.lr for section in settings] == [1e-3, 1e-4]
    assert [section.num_threads for section in settings] == [2, 2]
    assert plan.describe() == "steps 1 to 4 from the initial model · trained on 1 rank(s)"


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match=r"--out: .* is not empty"):
        replay_run(_run(tmp_path), out)


def test_a_run_that_still_goes_on_is_not_repeated(tmp_path: Path) -> None:
    run = _run(tmp_path)
    (run / "logs").mkdir()
    with (run / "logs" / "learner.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"the run still goes on: a process writes learner\.log"):
            replay_run(run, tmp_path / "out")


def test_the_first_metric_that_differs_is_named_and_times_do_not_count() -> None:
    recorded = {"step": 3, "policy/loss": 0.1, "entropy": 1.0, "time/step_s": 3.0, "filter/pass_rate": 1.0}
    assert compare_step(recorded, {**recorded, "time/step_s": 4.0}) is None
    smallest = 0.1 + 2**-56
    found = compare_step(recorded, {**recorded, "policy/loss": smallest, "entropy": 2.0})
    assert found == Difference(3, "policy/loss", 0.1, smallest)


def test_weights_are_compared_where_the_run_has_an_export_of_the_step(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for folder, content in ((run / "export-step-000002", b"1"), (run / "export", b"2"), (out / "export", b"1")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4}) + "\n")
    same = compare_export(run, out, 2)
    assert same is not None
    assert same.difference is None
    assert compare_export(run, out, 4) is None, "nothing says of which step the export is"
    (run / "accounting.json").write_text(json.dumps({"state": "completed"}))
    other = compare_export(run, out, 4)
    assert other is not None
    assert other.difference is not None
    assert other.difference.name == "export/model.safetensors"


@pytest.mark.parametrize(
    ("num_compared", "has_weights", "difference", "line"),
    [
        (2, True, None, "steps 1 to 2 are identical to the bit (2 compared), and so are the weights"),
        (0, False, None, "no metrics and no export"),
        (2, True, Difference(2, "policy/loss", 0.1, 0.2), "step 2, policy/loss: recorded 0.1, repeated 0.2"),
    ],
)
def test_the_verdict_says_what_was_compared(
    num_compared: int, has_weights: bool, difference: Difference | None, line: str
) -> None:
    result = ReplayResult(range(1, 3), num_compared, has_weights, difference, {}, Path())
    assert line in verdict(result)
