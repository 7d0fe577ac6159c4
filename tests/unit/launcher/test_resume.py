"""A run folder is all that a run needs to be resumed, and what cannot go on is refused before anything starts."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rollmesh.errors import ConfigError
from rollmesh.replay.connection import connect_blocking
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.keys import Keys
from rollmesh.telemetry.json_lines import JsonLines
from services.config import MeshConfig, dump_mesh, load_mesh
from services.launcher import resume as resume_module
from services.launcher.main import claim_folder, prepare_folder
from services.launcher.resume import mark_logs, resume, resume_folder
from services.launcher.run_folder import (
    note_start,
    read_requested,
    read_resumes,
    read_settings,
    write_requested,
    write_resolved,
)

Tree = dict[str, Any]
Started = list[tuple[MeshConfig, Path]]
RUN_ID = "0123456789abcdef"


@pytest.fixture
def config(tree: Tree, tmp_path: Path) -> MeshConfig:
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_mesh(path)


@pytest.fixture
def folder(config: MeshConfig) -> Path:
    """A run that was interrupted after step 4, with a checkpoint of step 4."""
    known = config.model_copy(update={"run": config.run.model_copy(update={"id": RUN_ID})})
    folder = prepare_folder(known, should_overwrite=False)
    note_start(folder, after_step=None)
    (folder / "accounting.json").write_text(json.dumps({"state": "interrupted", "num_groups": {}}))
    checkpoint = folder / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "logs" / "learner.log").write_text("half a li")
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been started."""
    started: Started = []

    def start(config: MeshConfig, folder: Path, *, is_resumed: bool) -> int:
        assert is_resumed
        started.append((config, folder))
        return 0

    monkeypatch.setattr(resume_module, "start", start)
    monkeypatch.setattr(resume_module, "print_findings", lambda config: None)
    return started


def test_the_folder_alone_is_enough(
    folder: Path, started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume_folder(Path("../runs/tiny"), ["training.steps=8"]) == 0
    [(config, used)] = started
    assert used == folder
    assert (config.run.id, config.training.steps) == (RUN_ID, 8)
    assert config.replay.url is None
    assert config.coordinator.address == "127.0.0.1:0"
    output = capsys.readouterr().out
    assert "goes on after step 4 · 8 steps at most" in output
    assert "changed    training.steps: 2 → 8" in output
    [resumed] = read_resumes(folder)
    assert (resumed["after_step"], resumed["changes"]) == (4, ["training.steps: 2 → 8"])
    assert resumed["earlier_end"] == "interrupted"
    assert not (folder / "accounting.json").exists()
    assert read_requested(folder).training.steps == 8


def test_the_file_of_the_run_is_enough(config: MeshConfig, folder: Path, started: Started) -> None:
    assert resume(config) == 0
    assert started[0][0].run.id == RUN_ID


def test_relative_paths_mean_what_they_meant_at_the_first_start(
    tree: Tree, tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree |= {"run": {"name": "tiny", "directory": "runs"}, "data": {"path": "train.jsonl", "label_key": "label"}}
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    config = load_mesh(Path("file.yaml"))
    folder = prepare_folder(config, should_overwrite=False)
    note_start(folder, after_step=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="there is no run in"):
        resume(config)
    resume_folder(folder, [])
    assert started[0][0].data.path == tmp_path / "train.jsonl"
    assert Path.cwd() == tmp_path


def test_a_folder_that_was_moved_is_still_the_run(folder: Path, started: Started, tmp_path: Path) -> None:
    (tmp_path / "attic").mkdir()
    moved = folder.rename(tmp_path / "attic" / "tiny")
    resume_folder(moved, [])
    assert started[0][0].run.folder == moved
    renamed = moved.rename(tmp_path / "attic" / "other")
    with pytest.raises(ConfigError, match=r"run\.name: 'tiny' is not the name of the folder"):
        resume_folder(renamed, [])


def _complete(folder: Path) -> None:
    (folder / "accounting.json").write_text('{"state": "completed"}')


def _no_checkpoint(folder: Path) -> None:
    intervals = ["learner.checkpoint.every_steps=null", "learner.checkpoint.every_minutes=null"]
    before = read_requested(folder, intervals)
    write_requested(folder, before)
    (folder / "checkpoints" / "step-000004" / "manifest.json").unlink()
    JsonLines(folder / "metrics.jsonl").append({"step": 3})


def _older(folder: Path) -> None:
    (folder / "requested.yaml").unlink()


def _no_run(folder: Path) -> None:
    (folder / "mesh.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_complete, "the run 'tiny' is complete with 2 steps; ask for more, e.g. --set training.steps=4"),
        (_no_checkpoint, "is none, and every_minutes too, so that step 3 was trained and no checkpoint was kept"),
        (_older, "an older version of RollMesh wrote the run"),
        (_no_run, "holds no run; name a run folder"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(
    folder: Path, started: Started, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        resume_folder(folder, [])
    assert message in str(caught.value)
    assert not started
    assert not read_resumes(folder)


def test_a_complete_run_may_be_made_longer(folder: Path, started: Started) -> None:
    _complete(folder)
    resume_folder(folder, ["training.steps=6"])
    assert started


def test_a_run_that_still_goes_on_is_left_alone(folder: Path, started: Started) -> None:
    with claim_folder(folder), pytest.raises(ConfigError, match="belongs to a run that still goes on"):
        resume_folder(folder, [])
    assert not started


def test_processes_of_the_earlier_part_are_awaited_and_then_named(
    folder: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_module, "LEFTOVERS_S", 0.0)
    with (folder / "logs" / "learner.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"processes of the run's earlier part .*learner\.log; end them"):
            resume_folder(folder, [])
    assert not started
    resume_folder(folder, [])
    assert started


def test_another_runs_keys_in_a_redis_of_the_users_are_refused(
    config: MeshConfig, folder: Path, started: Started, tmp_path: Path
) -> None:
    with EmbeddedRedis.start(tmp_path / "redis") as server:
        url = f"replay.url={server.url}"
        write_requested(folder, read_requested(folder, [url]))
        client = connect_blocking(server.url, 5.0)
        client.hset(Keys("tiny").identity, mapping={"id": RUN_ID, "created_s": "1"})
        assert resume_folder(folder, []) == 0
        client.hset(Keys("tiny").identity, "id", "f" * 16)
        (folder / "accounting.json").write_text("{}")
        with pytest.raises(ConfigError, match="of another run of this name; name the Redis that this run had"):
            resume_folder(folder, [])
        client.close()
    assert len(started) == 1
    assert (folder / "accounting.json").exists()


def test_a_refused_change_leaves_the_folder_as_it_is(folder: Path, started: Started) -> None:
    with pytest.raises(ConfigError, match=r"run\.seed: 7 differs from the 1"):
        resume_folder(folder, ["run.seed=7"])
    assert (folder / "accounting.json").exists()
    assert read_requested(folder).run.seed == 1


def test_logs_say_where_the_resumed_part_begins(folder: Path) -> None:
    (folder / "logs" / "reward.log").write_text("")
    mark_logs(folder, 4)
    first, second = (folder / "logs" / "learner.log").read_text().splitlines()
    assert first == "half a li"
    assert second.startswith("---- resumed after step 4 at 20")
    assert len((folder / "logs" / "reward.log").read_text().splitlines()) == 1


def test_what_a_power_cut_left_does_no_harm(folder: Path, started: Started) -> None:
    (folder / "mesh.yaml").write_text("")
    (folder / "requested.yaml.partial").write_text("run: {na")
    (folder / "checkpoints" / "step-000006.partial").mkdir()
    (folder / "starts.jsonl").open("a").write('{"time": "20')
    (folder / "metrics.jsonl").write_text('{"step": 4}\n{"st')
    (folder / "accounting.json").write_text('{"sta')
    assert read_settings(folder)["run"]["name"] == "tiny"
    resume_folder(folder, [])
    assert started
    assert len(read_resumes(folder)) == 1
    assert not (folder / "checkpoints" / "step-000006.partial").exists()


def test_the_claim_outlives_the_resolved_configuration(folder: Path, config: MeshConfig) -> None:
    with claim_folder(folder):
        write_resolved(folder, config)
        with pytest.raises(ConfigError, match="still goes on"), claim_folder(folder):
            pass
    assert (folder / "mesh.yaml").read_text() == dump_mesh(config)
