"""Every preset and every correction trains with all parts of the learner, with several steps and passes on a batch."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollmesh.algorithms.presets import PAPERS, PRESETS
from rollmesh.models.rows import Batching
from rollmesh.types import Group, Sample
from services.config import MeshConfig
from services.learner.batching import TokenColumns, pack
from services.learner.checkpoint import Learnables
from services.learner.composition import build_trainer, load_critic_engine, load_policy
from services.learner.engine import PolicyEngine
from services.learner.experience import build_experience
from services.learner.metrics import StepStatistics
from services.learner.ranks import Ranks
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

pytestmark = pytest.mark.engine

DOCS = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"
CORRECTIONS: dict[str, dict[str, Any]] = {
    **{name: {"correction": {"type": name}} for name in ("none", "tis", "icepop", "seq_mask_tis", "decoupled", "dppo")},
    "decoupled, approximated": {"correction": {"type": "decoupled", "proximal": "approximated"}},
    "m2po": {"correction": {"type": "m2po"}, "loss": {"clip_low": 0.2, "clip_high": 0.28}},
}
NUM_BATCHES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def _batches() -> list[list[Group]]:
    """Return old samples: their log-probabilities belong to no policy, and they are two or five versions old."""
    return [
        [
            *random_groups(2, 4, seed=10 * step, first_prompt=0, version=step, has_reference=True),
            *random_groups(2, 4, seed=10 * step + 1, first_prompt=2, version=step + 3, has_reference=True),
        ]
        for step in range(NUM_BATCHES)
    ]


def _train(
    model: Path, folder: Path, ranks: Ranks, algorithm: dict[str, Any]
) -> tuple[MeshConfig, list[StepStatistics]]:
    config = mesh_config(
        model,
        folder,
        algorithm={"kl": {"coef": 0.01, "target": 0.1}, **algorithm},
        reference={},
        learner={"steps_per_batch": 2, "epochs_per_batch": 2},
    )
    critic = load_critic_engine(config, ranks) if config.algorithm.needs_critic else None
    policy = load_policy(config, ranks)
    trainer = build_trainer(config, Learnables(policy, critic), ranks, NUM_BATCHES)
    steps, weights = [], []
    for step, groups in enumerate(_batches(), start=1):
        steps.append(trainer.train([groups[:2], groups[2:]], step, step + 4))
        with policy.whole([policy.tensor_specs()[0].name]) as tensors:
            weights += [float(tensor.double().sum()) for tensor in tensors.values()]
    return config, steps, weights


def _assert_sound(steps: list[StepStatistics]) -> None:
    for step in steps:
        for name, value in step.metrics.items():
            assert math.isfinite(value), f"{name} is {value}"
        assert math.isfinite(step.loss)
        assert step.metrics["optimizer/grad_norm"] > 0
    assert len({step.loss for step in steps}) == NUM_BATCHES


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_on_old_samples_and_stays_finite(
    model: Path, tmp_path: Path, ranks: Ranks, preset: str
) -> None:
    config, steps, _ = _train(model, tmp_path, ranks, {"type": preset})
    _assert_sound(steps)
    has_value = "value/explained_variance" in steps[0].metrics
    assert has_value == config.algorithm.needs_critic == (preset == "ppo")


def _step_on_own_samples(model: Path, folder: Path, ranks: Ranks, algorithm: dict[str, Any]) -> tuple[float, float]:
    """Return by how much one step moves the mean log-probability of rewarded samples, and of the other samples.

    Behaviour policy, reference and policy have the same log-probabilities of these samples.
    """
    learner = {"optimizer": {"lr": 1e-3}, "critic": {"optimizer": {"lr": 1e-3}}}
    config = mesh_config(model, folder, algorithm={"kl": {"coef": 0.01}, **algorithm}, reference={}, learner=learner)
    critic = load_critic_engine(config, ranks) if config.algorithm.needs_critic else None
    policy = load_policy(config, ranks)
    groups = [_own(policy, group) for group in random_groups(4, 4, seed=5, has_reference=True)]
    build_trainer(config, Learnables(policy, critic), ranks, 1).train([groups], 1, 0)
    moved: dict[bool, list[float]] = {True: [], False: []}
    for sample in (sample for group in groups for sample in group.samples):
        assert sample.score is not None
        change = _logprobs(policy, sample) - torch.from_numpy(sample.behaviour_logprobs)
        moved[sample.score.reward > 0.5].append(float(change.mean()))
    return statistics.fmean(moved[True]), statistics.fmean(moved[False])


def _own(policy: PolicyEngine, group: Group) -> Group:
    samples = []
    for sample in group.samples:
        logprobs = _logprobs(policy, sample).numpy()
        samples.append(replace(sample, behaviour_logprobs=logprobs, reference_logprobs=logprobs))
    return replace(group, samples=tuple(samples))


def _logprobs(policy: PolicyEngine, sample: Sample) -> torch.Tensor:
    """Return the log-probabilities of the G generated tokens under the present policy, float32 [G]."""
    experience = build_experience([[Group("alone", sample.prompt_id, 0, 0, (sample,))]], False)
    nothing = torch.zeros(experience.num_tokens)
    columns = TokenColumns(nothing, nothing, nothing.double(), nothing.long())
    return policy.logprobs(pack(experience.sequences, [0], ((0,),), columns, Batching.SINGLE)).cpu()


@pytest.mark.parametrize("algorithm", [*({"type": preset} for preset in PRESETS), *CORRECTIONS.values()], ids=str)
def test_a_step_makes_rewarded_samples_likelier_than_the_others(
    model: Path, tmp_path: Path, ranks: Ranks, algorithm: dict[str, Any]
) -> None:
    rewarded, others = _step_on_own_samples(model, tmp_path, ranks, algorithm)
    assert rewarded > 0 > others


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction_trains_on_old_samples_and_stays_finite(
    model: Path, tmp_path: Path, ranks: Ranks, correction: str
) -> None:
    _, steps, _ = _train(model, tmp_path, ranks, CORRECTIONS[correction])
    _assert_sound(steps)


def test_every_metric_and_every_preset_is_documented(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    _, steps, _ = _train(model, tmp_path, ranks, {"type": "ppo"})
    text = DOCS.read_text(encoding="utf-8")
    for name in steps[0].metrics:
        if not name.startswith("time/"):
            assert f"`{name}`" in text, f"{name} is not in docs/algorithms.md"
    for preset in PRESETS:
        assert re.search(rf"^\| `{re.escape(preset)}` .*{re.escape(PAPERS[preset])}", text, re.MULTILINE), preset


def test_a_frozen_policy_stays_while_the_critic_learns(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    _, steps, weights = _train(model, tmp_path, ranks, {"type": "ppo", "policy_frozen_steps": 2})
    assert weights[0] == weights[1] != weights[2]
    assert [step.metrics["optimizer/lr"] > 0 for step in steps] == [False, False, True]
    assert ["optimizer/grad_norm" in step.metrics for step in steps] == [False, False, True]
    assert all(step.metrics["value/grad_norm"] > 0 for step in steps)


def test_the_coefficient_of_the_penalty_goes_after_its_target(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    _, steps, _ = _train(model, tmp_path, ranks, {"kl": {"coef": 0.01, "target": 1e-4, "horizon": 32}})
    coefficients = [step.metrics["kl/coef"] for step in steps]
    assert coefficients[0] == 0.01
    assert coefficients == sorted(set(coefficients)), "the divergence is over the target, and the price does not rise"
