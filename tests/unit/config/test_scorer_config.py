"""A file may describe the servers that score alone: it needs what they use, and no section of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rollmesh.cli import main
from rollmesh.errors import ConfigError
from services.config import MeshConfig, ScorerConfig, dump_mesh, load_config, load_mesh
from tests.unit.config.test_mesh import MINIMAL

REWARD: dict[str, Any] = {
    "run": {"name": "first"},
    "coordinator": {"address": "10.0.0.1:7000"},
    "reward": {"function": "reward.py", "address": "10.0.0.2:7001"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump(REWARD))
    return path


def test_a_reward_server_needs_no_model_and_no_training(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert type(config) is ScorerConfig
    assert (config.reward.address, config.model) == ("10.0.0.2:7001", None)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_mesh(config))
    assert load_config(resolved) == config


def test_a_file_with_any_section_of_a_mesh_is_a_mesh(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert isinstance(load_config(path), MeshConfig)
    assert load_config(path) == load_mesh(path)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("reward.address=10.0.0.2:0", "reward.address: 10.0.0.2:0 leaves the port open; name the port"),
        ("coordinator={}", "coordinator.address: 127.0.0.1:0 leaves the port open; name the port"),
        (
            "reward={}",
            "configuration: describes no server and no mesh; set reward.function, add `refer",
        ),
        (
            "reference={address: '10.0.0.2:7002'}",
            "model: is missing, and the reference server loads it; add",
        ),
        (
            "training={steps: 1}",
            "model, data, sampling: are missing; add these sections",
        ),
        ("run={}", "run.name: is missing"),
        ("rewards={}", "rewards: is not a known key; did you mean 'reward'?"),
    ],
)
def test_what_a_server_on_its_own_lacks_is_named(file: Path, override: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert str(caught.value).startswith(fault)


def test_the_check_looks_at_the_servers_and_a_mesh_is_not_started_from_them(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function = tmp_path / "reward.py"
    function.write_text("def reward_func(queries, prompts, labels):\n    return [0.0]\n")
    assert main(["config", "check", str(file), "--set", f"reward.function={function}"]) == 0
    assert "reward_func found" in capsys.readouterr().out
    assert main(["up", str(file)]) == 2
    assert "error: model, data, training, sampling: are missing; add these sections" in capsys.readouterr().err
