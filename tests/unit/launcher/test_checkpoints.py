"""A run's checkpoints are listed from the run folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from services.launcher.checkpoints import CheckpointEntry, format_bytes, list_checkpoints, show


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mesh.yaml").write_text("run: {name: tiny}\n")
    for step in (20, 100, 1_000_000):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:06d}"
        (checkpoint / "policy").mkdir(parents=True)
        (checkpoint / "policy" / "weights").write_bytes(bytes(1500))
        manifest = checkpoint / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "policy_version": f"0.{step}"}).ljust(100))
        os.utime(manifest, (1_700_000_000, 1_700_000_000))
    (tmp_path / "checkpoints" / "step-000030.partial").mkdir()
    evaluations = [{"step": 0, "pass_at_1": 0.1}, {"step": 100, "pass_at_1": 0.75}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in evaluations) + '{"st')
    return tmp_path


def test_they_are_listed_by_step_with_the_score_of_that_step(folder: Path) -> None:
    first, second, third = list_checkpoints(folder)
    assert first == CheckpointEntry(
        20, "0.20", "2023-11-14T22:13:20+00:00", None, 1600, "checkpoints/step-000020", False
    )
    assert (second.step, second.pass_at_1, second.is_best) == (100, 0.75, True)
    assert third.step == 1_000_000


def test_the_best_is_marked_by_the_metric_that_the_run_keeps(folder: Path) -> None:
    settings = "learner: {checkpoint: {keep_best: mean_generated_tokens, best_is: lowest}}\n"
    (folder / "mesh.yaml").write_text("run: {name: tiny}\n" + settings)
    lines = [{"step": step, "pass_at_1": 0.5, "mean_generated_tokens": step / 10} for step in (100, 20, 30)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [entry.step for entry in list_checkpoints(folder) if entry.is_best] == [20]


def test_people_get_a_table_and_programs_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(folder, is_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "version", "written", "(UTC)", "pass@1", "best", "size", "folder"]
    assert lines[2].split() == [
        "100",
        "0.100",
        "2023-11-14",
        "22:13:20",
        "0.750",
        "*",
        "1.6",
        "kB",
        "checkpoints/step-000100",
    ]
    assert len({line.index("checkpoints") for line in lines[1:]}) == 1
    show(folder, is_json=True)
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [20, 100, 1_000_000]


def test_a_checkpoint_without_a_readable_manifest_is_none(folder: Path) -> None:
    (folder / "checkpoints" / "step-000100" / "manifest.json").write_text('{"step": 1')
    (folder / "checkpoints" / "step-000020" / "manifest.json").unlink()
    assert [entry.step for entry in list_checkpoints(folder)] == [1_000_000]


def test_a_run_without_any_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mesh.yaml").write_text("")
    show(tmp_path, is_json=False)
    assert "holds no complete checkpoint" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no run"):
        show(tmp_path / "nowhere", is_json=True)


def test_the_command_needs_no_torch(folder: Path) -> None:
    code = "import sys; from rollmesh.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "checkpoints", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert len(json.loads(done.stdout)) == 3
    assert not {"torch", "vllm", "deepspeed", "transformers"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (1_000, "1.0 kB"), (1_532_000_000, "1.5 GB"), (999_960, "1.0 MB")]
)
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
