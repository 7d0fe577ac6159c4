"""The recorder keeps the batches of the surviving lineage, and settings that two starts have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from rollmesh.replay.recording import load_recorded, recorded_paths
from rollmesh.types import PolicyVersion
from services.config import load_mesh
from services.learner.recorder import BatchRecorder, learner_settings
from tests.unit.learner.samples import mesh_config, random_groups


def test_steps_after_the_checkpoint_are_dropped_when_a_learner_starts_again(tmp_path: Path) -> None:
    recorder = BatchRecorder(tmp_path / "batches", "", 1, 20)
    for step in (1, 2, 3):
        recorder.record(step, PolicyVersion(0, step - 1), random_groups(1, 2, seed=step))
    recorder.cut(after_step=1)
    recorder.record(2, PolicyVersion(1, 4), random_groups(1, 2, seed=9))
    paths = recorded_paths(tmp_path / "batches")
    assert list(paths) == [1, 2]
    assert load_recorded(paths[2])[0].policy_version == PolicyVersion(1, 4)


def test_a_batch_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "batches").write_text("in the way")
    recorder = BatchRecorder(tmp_path / "batches", "", 1, 20)
    with pytest.raises(ConfigError, match=r"learner\.should_record_batches: the batch of step 1 cannot be written"):
        recorder.record(1, PolicyVersion(0, 0), random_groups(1, 2))


def test_two_starts_with_other_ports_record_the_same_settings_and_no_password(tmp_path: Path) -> None:
    starts = [
        mesh_config(
            Path("model"),
            tmp_path,
            run={"id": f"{port:08x}"},
            coordinator={"address": f"127.0.0.1:{port}"},
            learner={"address": f"127.0.0.1:{port + 1}"},
            replay={"url": f"redis://:secret@127.0.0.1:{port}"},
        )
        for port in (4000, 5000)
    ]
    first, second = map(learner_settings, starts)
    assert first == second
    assert "secret" not in first
    file = tmp_path / "mesh.yaml"
    file.write_text(first)
    read = load_mesh(file)
    assert read.model.path == Path("model").absolute()
    assert read.algorithm == starts[0].algorithm
    assert (
        learner_settings(starts[0].model_copy(update={"sampling": read.sampling.model_copy(update={"top_p": 0.9})}))
        != first
    )
