"""Small parts of the learner: schedule, staleness bound, checks at the entry, recording, random states."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rollmesh.errors import ConfigError, ReplayError
from rollmesh.types import PolicyVersion
from services.learner.checks import check_start
from services.learner.config import OptimizerSection
from services.learner.intake import check_staleness
from services.learner.main import main
from services.learner.random_state import random_state, restore_random_state
from services.learner.schedule import learning_rate
from tests.unit.learner.samples import group, mesh_config, sample


def test_warm_up_reaches_the_full_rate_at_its_last_step_and_decay_ends_at_the_minimum() -> None:
    section = OptimizerSection(lr=1.0, warmup_steps=5, schedule="linear", min_lr_ratio=0.1)
    rates = [learning_rate(section, step, 60) for step in range(1, 61)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_cosine_is_halfway_at_half_time_and_constant_stays() -> None:
    cosine = OptimizerSection(lr=2.0, schedule="cosine", min_lr_ratio=0.0)
    assert learning_rate(cosine, 51, 101) == pytest.approx(1.0)
    assert learning_rate(cosine, 500, 101) == pytest.approx(0.0)
    constant = OptimizerSection(lr=2.0, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(1, 11)} == {2.0}


def test_a_run_of_one_step_has_a_learning_rate() -> None:
    assert learning_rate(OptimizerSection(lr=1.0, schedule="linear"), 1, 1) == 1.0


def _aged(*versions: int) -> list[object]:
    return [group([sample(index, version=version) for index, version in enumerate(versions)])]


def test_a_batch_within_the_bound_passes() -> None:
    check_staleness(_aged(5, 4, 3), PolicyVersion(0, 5), bound=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("versions", [(5, 2), (6,)])
def test_a_sample_over_the_bound_or_from_the_future_stops_the_run(versions: tuple[int, ...]) -> None:
    with pytest.raises(ReplayError, match=r"train:0:0 .* bound is 2"):
        check_staleness(_aged(*versions), PolicyVersion(0, 5), bound=2)  # type: ignore[arg-type]


def test_a_sample_of_the_lineage_that_was_left_is_as_old_as_the_numbers_say() -> None:
    check_staleness(_aged(5, 4), PolicyVersion(1, 6), bound=2)  # type: ignore[arg-type]
    with pytest.raises(ReplayError, match=r"version 0\.3, but the learner is at 1\.6 and the staleness bound is 2"):
        check_staleness(_aged(3), PolicyVersion(1, 6), bound=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("learner", [PolicyVersion(1, 5), PolicyVersion(1, 4)], ids=str)
def test_a_lineage_begins_with_a_number_that_no_sample_has(learner: PolicyVersion) -> None:
    with pytest.raises(ReplayError, match=r"version 0\.5, but the learner is at"):
        check_staleness(_aged(5), learner, bound=2)  # type: ignore[arg-type]


def _model(folder: Path, settings: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_the_learner_refuses_to_start_without_a_redis(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", {"architectures": ["Qwen2ForCausalLM"]})
    with pytest.raises(ConfigError, match=r"^replay\.url: is not set; "):
        main(mesh_config(model, tmp_path), "learner")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "does not exist"),
        (lambda folder: folder, "has no config.json"),
        (lambda folder: _model(folder / "bert", {"architectures": ["BertForMaskedLM"]}), "holds a BertForMaskedLM"),
        (lambda folder: _model(folder / "odd", {}), "names no architecture"),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    config = mesh_config(make(tmp_path), tmp_path, replay={"url": "redis://127.0.0.1:1"})
    with pytest.raises(ConfigError, match=message) as caught:
        check_start(config.learner, config.model, needs_critic=False)
    assert str(caught.value).startswith("model.path: ")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    model = _model(tmp_path / "m", {"architectures": ["GPT2LMHeadModel"]})
    config = mesh_config(model, tmp_path, replay={"url": "redis://127.0.0.1:1"}, learner={"device": "cuda"})
    with pytest.raises(ConfigError, match=r"^learner\.device: "):
        check_start(config.learner, config.model, needs_critic=False)


def test_several_ranks_need_the_path_of_the_mesh_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLLMESH_CONFIG", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    model = _model(tmp_path / "m", {"architectures": ["Qwen2ForCausalLM"]})
    config = mesh_config(model, tmp_path, replay={"url": "redis://127.0.0.1:1"}, learner={"num_ranks": 2})
    with pytest.raises(ConfigError, match=r"^learner\.num_ranks: "):
        main(config, "learner")


def test_several_ranks_start_through_the_command_line_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run_ranks(command: list[str], num_ranks: int, name: str) -> int:
        commands.append([str(num_ranks), *command])
        return 0

    monkeypatch.setattr("services.learner.main.run_ranks", run_ranks)
    monkeypatch.setenv("ROLLMESH_CONFIG", "/mesh.yaml")
    monkeypatch.setenv("ROLLMESH_OVERRIDES", '["run.seed=3"]')
    monkeypatch.delenv("RANK", raising=False)
    model = _model(tmp_path / "m", {"architectures": ["Qwen2ForCausalLM"]})
    config = mesh_config(model, tmp_path, replay={"url": "redis://127.0.0.1:1"}, learner={"num_ranks": 2})
    assert main(config, "learner") == 0
    (command,) = commands
    assert command[0] == "2"
    assert command[-6:] == ["learner", "--config", "/mesh.yaml", "--name", "learner", "--set=run.seed=3"]


def test_the_random_generators_go_on_where_the_checkpoint_was_taken() -> None:
    text = random_state()
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    restore_random_state(text)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == drawn
