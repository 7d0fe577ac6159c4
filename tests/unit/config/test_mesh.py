"""A mesh file is read strictly: every fault is one sentence with the place, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rollmesh.errors import ConfigError
from services.config import MeshConfig, dump_mesh, load_mesh

EXAMPLES = sorted(Path("examples").glob("*/mesh*.yaml"))

MINIMAL = {
    "run": {"name": "tiny"},
    "model": {"path": "model", "max_length": 96},
    "data": {"path": "train.jsonl"},
    "training": {"steps": 6, "prompts_per_step": 4, "samples_per_prompt": 2},
    "sampling": {"max_new_tokens": 66},
    "reward": {"function": "reward.py"},
}


@pytest.fixture
def mesh_file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_every_shipped_mesh_file_is_valid(path: Path) -> None:
    assert isinstance(load_mesh(path), MeshConfig)


def test_shipped_mesh_files_are_found() -> None:
    assert len(EXAMPLES) >= 2


def test_the_resolved_file_reads_back_to_the_same_configuration(mesh_file: Path, tmp_path: Path) -> None:
    config = load_mesh(mesh_file, ["learner.optimizer.lr=3e-4", "algorithm.kl.coef=0.01", "reference={}"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_mesh(config))
    assert load_mesh(resolved) == config


def test_an_override_reaches_its_key_and_nothing_else(mesh_file: Path) -> None:
    plain = load_mesh(mesh_file)
    changed = load_mesh(mesh_file, ["training.max_staleness=4"])
    assert changed.training.max_staleness == 4
    assert changed.training.num_slots == 20
    assert changed.model_copy(update={"training": plain.training}) == plain


@pytest.mark.parametrize(
    ("override", "place", "fix"),
    [
        ("learner.optimizer.lrr=3", "learner.optimizer.lrr", "did you mean 'lr'?"),
        ("trainning={}", "trainning", "did you mean 'training'?"),
        ("reference.tokens=3", "reference.tokens", "known keys are"),
        ("training.steps=-1", "training.steps", "greater than 0"),
        ("training.steps=many", "training.steps", "'many'"),
        ("run.name=../up", "run.name", "'../up'"),
        ("training.slots=2", "training.slots", "use 4 to 8"),
        ("training.slots=9", "training.slots", "(max_staleness + 1) × prompts_per_step = 8"),
        ("learner.num_ranks=3", "training.prompts_per_step", "4 is not divisible by learner.num_ranks 3"),
        ("algorithm.kl.coef=0.1", "algorithm.kl.coef", "add a `reference:` section"),
        ("training.samples_per_prompt=1", "training.samples_per_prompt", "set it to 2 or more"),
        ("sampling.max_new_tokens=96", "sampling.max_new_tokens", "model.max_length 96"),
        ("learner.tokens_per_micro_batch=95", "learner.tokens_per_micro_batch", "model.max_length 96"),
        ("reward.function=null", "reward", "neither a `function` file nor the `address`"),
        ("reward.timeout_s=120", "rollout.scoring_timeout_s", "raise the one or lower the other"),
        ("learner.attention=flash", "learner.attention", "use eager, sdpa"),
        ("training=3", "training", "write a mapping of settings"),
        ("coordinator.member_timeout_s=1", "coordinator.member_timeout_s", "two heartbeats"),
        ("sampling.temperature=0", "sampling.temperature", "greater than 0"),
        ("learner.zero_stage=4", "learner.zero_stage", "4 is not accepted"),
        ("no-equals-sign", "--set", "dotted.key=value"),
        ("run.name.deep=1", "--set run.name.deep", "is a value, not a section"),
    ],
)
def test_a_fault_names_the_place_and_the_fix(mesh_file: Path, override: str, place: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mesh(mesh_file, [override])
    assert caught.value.place == place
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("run: [", "is not valid YAML"), ("- a", "holds a list"), ("", "is missing")],
)
def test_a_file_that_is_no_mesh_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_mesh(path)


def test_a_syntax_error_is_placed_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("run:\n  name: [\n")
    with pytest.raises(ConfigError, match=r"mesh\.yaml, line 3, column 1: is not valid YAML \("):
        load_mesh(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_mesh(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_mesh(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("staleness", "choice", "resolved"),
    [
        (0, "auto", "recomputed"),
        (1, "auto", "behaviour"),
        (4, "recomputed", "recomputed"),
        (0, "behaviour", "behaviour"),
    ],
)
def test_the_ratio_is_against_behaviour_when_asynchronous(
    mesh_file: Path, staleness: int, choice: str, resolved: str
) -> None:
    overrides = [f"training.max_staleness={staleness}", f"algorithm.denominator={choice}"]
    assert load_mesh(mesh_file, overrides).ratio_denominator == resolved
