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
        (
            "reward.timeout_s=120",
            "rollout.scoring_timeout_s",
            "raise rollout.scoring_timeout_s or lower reward.timeout_s",
        ),
        ("learner.attention=flash", "learner.attention", "use auto, eager, sdpa"),
        ("reference.attention=flash", "reference.attention", "use auto, eager, sdpa"),
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
    [
        ("run: [", "is not valid YAML"),
        ("- a", "holds a list"),
        ("", "is empty"),
        ("run: {name: x}", "model, data, training, sampling: are missing; add"),
    ],
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
    ("staleness", "overrides", "resolved"),
    [
        (0, [], ("tis", "old")),
        (1, [], ("none", "behaviour")),
        (4, ["correction.ratio=old"], ("none", "old")),
        (0, ["correction.ratio=behaviour"], ("none", "behaviour")),
        (0, ["type=gspo"], ("none", "old")),
        (1, ["type=gspo"], ("none", "behaviour")),
        (1, ["correction.type=icepop"], ("icepop", "old")),
        (0, ["correction.type=m2po"], ("m2po", "behaviour")),
        (4, ["correction.type=dppo"], ("dppo", "behaviour")),
        (4, ["correction.type=decoupled"], ("decoupled", "old")),
        (4, ["loss.type=policy_gradient"], ("tis", "old")),
    ],
)
def test_the_correction_follows_from_staleness_where_it_is_not_named(
    mesh_file: Path, staleness: int, overrides: list[str], resolved: tuple[str, str]
) -> None:
    settings = [f"training.max_staleness={staleness}", *(f"algorithm.{override}" for override in overrides)]
    assert load_mesh(mesh_file, settings).algorithm.resolve_correction(staleness) == resolved


@pytest.mark.parametrize(
    ("overrides", "is_needed"),
    [
        ([], False),
        (["learner.steps_per_batch=2"], False),
        (["learner.epochs_per_batch=2", "algorithm.correction.type=tis"], True),
        (["algorithm.correction.type=tis"], False),
        (
            [
                "learner.epochs_per_batch=2",
                "algorithm.correction.type=decoupled",
                "algorithm.correction.proximal=approximated",
            ],
            False,
        ),
        (["algorithm.correction.type=m2po"], True),
        (["algorithm.kl.coef=0.1", "reference={}"], False),
        (["algorithm.kl.coef=0.1", "reference={}", "algorithm.kl.place=reward"], True),
    ],
)
def test_old_log_probabilities_are_computed_apart_only_where_they_differ_or_come_first(
    mesh_file: Path, overrides: list[str], is_needed: bool
) -> None:
    config = load_mesh(mesh_file, overrides)
    staleness, updates = config.training.max_staleness, config.learner.updates_per_batch
    assert config.algorithm.needs_old_pass(staleness, updates) == is_needed


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        ([], False),
        (["sampling.top_p=0.9"], True),
        (["sampling.top_k=50", "training.max_staleness=0"], True),
        (["sampling.top_p=0.9", "algorithm.correction.type=none", "algorithm.correction.ratio=old"], False),
        (["algorithm.kl.coef=0.1", "algorithm.kl.estimator=k1", "reference={}"], True),
        (["algorithm.kl.coef=0.1", "algorithm.kl.place=reward", "reference={}"], True),
        (["algorithm.filter.should_drop_zero_variance=true"], False),
        (["algorithm.filter.should_drop_zero_variance=true", "algorithm.type=ppo"], True),
    ],
)
def test_settings_that_work_and_are_probably_not_meant_are_warned_of(
    mesh_file: Path, overrides: list[str], is_warned: bool
) -> None:
    assert bool(load_mesh(mesh_file, overrides).warnings) == is_warned


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["training.samples_per_prompt=1"], "training.samples_per_prompt"),
        (
            ["training.samples_per_prompt=1", "algorithm.type=ppo", "algorithm.filter.should_drop_zero_variance=true"],
            "training.samples_per_prompt",
        ),
        (["algorithm.reward.overlong_buffer_tokens=100000"], "algorithm.reward.overlong_buffer_tokens"),
        (["algorithm.policy_frozen_steps=3"], "algorithm.policy_frozen_steps"),
        (["learner.steps_per_batch=1000"], "learner.steps_per_batch"),
        (["algorithm.type=gspo", "algorithm.correction.type=tis"], "algorithm.correction.type"),
        (["algorithm.type=grop"], "algorithm.type"),
        (["algorithm.correction.type=m2po", "learner.epochs_per_batch=2"], "algorithm.correction.type"),
        (
            [
                "training.max_staleness=0",
                "algorithm.correction.type=decoupled",
                "algorithm.correction.proximal=approximated",
            ],
            "algorithm.correction.proximal",
        ),
        (["algorithm.kl.target=0.1"], "algorithm.kl.target"),
        (
            ["algorithm.kl.coef=0.1", "algorithm.kl.target=0.1", "algorithm.kl.horizon=1", "reference={}"],
            "algorithm.kl.horizon",
        ),
    ],
)
def test_objectives_that_cannot_work_are_refused_by_name(mesh_file: Path, overrides: list[str], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mesh(mesh_file, overrides)
    assert caught.value.place == place


def test_a_critic_whose_optimiser_is_partly_set_keeps_its_own_rate(mesh_file: Path) -> None:
    config = load_mesh(mesh_file, ["learner.critic.optimizer.warmup_steps=5"])
    assert (config.learner.critic.optimizer.lr, config.learner.optimizer.lr) == (9e-6, 1e-6)


def test_one_sample_for_a_prompt_is_enough_where_nothing_is_compared(mesh_file: Path) -> None:
    for name in ("ppo", "reinforce++"):
        config = load_mesh(mesh_file, [f"algorithm.type={name}", "training.samples_per_prompt=1"])
        assert config.algorithm.needs_critic == (name == "ppo")
