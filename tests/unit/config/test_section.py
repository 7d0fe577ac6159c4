"""What every section does with a value, whatever the field."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rollmesh.cli import build_parser
from rollmesh.errors import ConfigError
from services.config import MeshConfig, load_mesh
from tests.unit.config.test_mesh import MINIMAL


@pytest.fixture
def mesh_file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def fault(mesh_file: Path, override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_mesh(mesh_file, [override])
    return str(caught.value)


def test_home_and_variables_are_expanded_in_every_path(mesh_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    fields = ["data.path", "run.directory", "reward.function", "reference.model_path", "learner.critic.model_path"]
    for field in fields:
        for written, meant in [
            ("~/x", "/home/ada/x"),
            ("$SCRATCH/x", "/scratch/ada/x"),
            ("a/${SCRATCH}", "a//scratch/ada"),
        ]:
            node: Any = load_mesh(mesh_file, [f"{field}={written}"])
            for part in field.split("."):
                node = getattr(node, part)
            assert node == Path(meant)


def test_home_is_expanded_on_the_command_line_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert build_parser().parse_args(["status", "--config=~/mesh.yaml"]).config == Path("/home/ada/mesh.yaml")
    assert build_parser().parse_args(["report", "~/runs/first"]).folder == Path("/home/ada/runs/first")


@pytest.mark.parametrize("written", ["./~", "a~b", "a/~/b", "cost$", "$5"])
def test_other_paths_are_taken_as_they_are(mesh_file: Path, written: str) -> None:
    assert load_mesh(mesh_file, [f"data.path={written}"]).data.path == Path(written)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("$NO_SUCH_VARIABLE/x", "set the environment variable NO_SUCH_VARIABLE, or write the path out"),
        ("${NO_SUCH_VARIABLE}", "set the environment variable NO_SUCH_VARIABLE, or write the path out"),
        ("~nobody-of-this-name/x", "there is no user 'nobody-of-this-name' here; write the path out, or ./~nobody"),
        ("''", "name a path; the working directory is '.'"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(mesh_file: Path, written: str, problem: str) -> None:
    assert "NO_SUCH_VARIABLE" not in os.environ
    message = fault(mesh_file, f"data.path={written}")
    assert message.startswith("data.path: ")
    assert problem in message


def test_a_run_may_be_named_by_a_number(mesh_file: Path) -> None:
    assert load_mesh(mesh_file, ["run.name=20240501"]).run.name == "20240501"
    assert load_mesh(mesh_file, ["run.name=007"]).run.name == "007"
    assert "put it in quotes" in fault(mesh_file, "run.name=1.10")
    assert "put it in quotes" in fault(mesh_file, "data.input_key=3")


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=true",
        "run.seed=false",
        "learner.optimizer.lr=true",
        "training.slots=true",
        "learner.optimizer.lr=.inf",
        "learner.optimizer.lr=.nan",
        "learner.optimizer.betas=[.nan, 0.9]",
        "training.steps=1.5",
        "training.steps=yes",
    ],
)
def test_what_is_no_number_is_refused_as_one(mesh_file: Path, override: str) -> None:
    assert fault(mesh_file, override).startswith(override.partition("=")[0])


def test_a_truth_value_may_be_written_in_any_usual_way(mesh_file: Path) -> None:
    for text, meant in [("yes", True), ("on", True), ("true", True), ("no", False), ("off", False), ("False", False)]:
        config: MeshConfig = load_mesh(mesh_file, [f"data.shuffle={text}"])
        assert config.data.shuffle is meant
