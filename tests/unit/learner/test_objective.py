"""The loss of a micro-batch is equal to the formulas, written out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rollmesh.algorithms.presets import PRESETS
from rollmesh.algorithms.segments import Segments
from services.learner.batching import MicroBatch, TokenColumns
from services.learner.objective import TOKEN_SUMS, Objective
from tests.unit.learner.samples import mesh_config

NUM_TOKENS = 10.0


def _objective(max_staleness: int = 1, **algorithm: Any) -> Objective:
    config = mesh_config(Path("model"), Path(), training={"max_staleness": max_staleness}, algorithm=algorithm)
    return Objective(config.algorithm, config.training.max_staleness)


def _batch(
    behaviour: list[float],
    advantages: list[float],
    reference: list[float] | None = None,
    weights: list[float] | None = None,
    **columns: torch.Tensor,
) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    count = len(behaviour)
    return MicroBatch(
        input_ids=nothing,
        position_ids=nothing,
        predictors=nothing,
        targets=nothing,
        places=torch.arange(count),
        tokens=Segments(torch.tensor([count])),
        columns=TokenColumns(
            behaviour=torch.tensor(behaviour),
            advantages=torch.tensor(advantages),
            loss_weights=torch.tensor(weights or [1 / NUM_TOKENS] * count, dtype=torch.float64),
            versions_apart=torch.ones(count, dtype=torch.int64),
            reference=None if reference is None else torch.tensor(reference),
            **columns,
        ),
    )


def _run(
    objective: Objective, logprobs: list[float], batch: MicroBatch, kl_coef: float = 0.0, aux_loss: float = 0.0
) -> tuple[float, list[float], dict[str, float]]:
    leaf = torch.tensor(logprobs, requires_grad=True)
    entropies = 2 * leaf
    loss, sums = objective((leaf, entropies, torch.tensor(aux_loss)), batch, NUM_TOKENS, kl_coef)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return loss.item(), leaf.grad.tolist(), dict(zip(TOKEN_SUMS, sums.tolist(), strict=False))


def test_against_behaviour_the_ratio_is_clipped_and_nothing_is_weighted() -> None:
    behaviour, logprobs = [-2.0, -1.0, -1.0], [-1.0, -1.0, -1.1]
    loss, gradient, sums = _run(_objective(), logprobs, _batch(behaviour, [1.0, 1.0, -1.0]))
    assert loss == pytest.approx((-1.28 - 1.0 + 0.904837) / 10, abs=1e-5)
    assert gradient == pytest.approx([0.0, -0.1, 0.0904837], abs=1e-5)
    assert (sums["clipped_high"], sums["clipped_low"], sums["tokens"]) == (1, 0, 3)
    assert sums["kl_behaviour"] == pytest.approx(-0.9, abs=1e-5)
    assert sums["loss"] == pytest.approx(loss, abs=1e-6)


EVERY_OBJECTIVE: list[dict[str, Any]] = [
    *({"type": preset} for preset in PRESETS),
    *(
        {"correction": {"type": name}}
        for name in ("none", "tis", "icepop", "seq_mask_tis", "decoupled", "m2po", "dppo")
    ),
    {"correction": {"type": "decoupled", "proximal": "approximated"}},
    {"correction": {"type": "dppo", "divergence": "kl"}},
]


@pytest.mark.parametrize("algorithm", EVERY_OBJECTIVE, ids=str)
@pytest.mark.parametrize("forbidden_by", ["behaviour", "old", "current", "all"])
def test_a_token_that_a_policy_forbids_has_weight_0_and_is_counted(
    algorithm: dict[str, Any], forbidden_by: str
) -> None:
    none, allowed = -math.inf, [-1.0, -2.0, -1.5]
    behaviour, old, logprobs = list(allowed), torch.tensor([-1.1, -2.1, -1.4]), [-1.2, -1.9, -1.5]
    reference = [-1.3, none if forbidden_by == "all" else -2.0, -1.0]
    if forbidden_by in ("behaviour", "all"):
        behaviour[1] = none
    if forbidden_by in ("old", "all"):
        old[1] = none
    if forbidden_by in ("current", "all"):
        logprobs[1] = none
    batch = _batch(behaviour, [1.0, -1.0, 1.0], reference, old=old, is_kept=torch.ones(3, dtype=torch.bool))
    objective = _objective(entropy_coef=0.0, **algorithm)
    loss, gradient, sums = _run(objective, logprobs, batch, kl_coef=0.1)
    assert math.isfinite(loss)
    assert all(map(math.isfinite, gradient))
    assert gradient[1] == 0.0
    assert any(gradient)
    assert (sums["forbidden"], sums["tokens"]) == (1, 3)
    assert sums["dropped"] >= 1
    assert all(math.isfinite(value) for name, value in sums.items() if name != "entropy")


def test_the_largest_ratio_is_exact_over_micro_batches_and_asked_for_once() -> None:
    objective = _objective()
    for shift in (1e-5, 2e-5, -0.5):
        _run(objective, [-1.0, -1.0], _batch([-1.0, -1.0 - shift], [1.0, 1.0]))
    assert objective.take_largest_ratio() == pytest.approx(1 + 2e-5, abs=1e-6)
    assert objective.take_largest_ratio() == 0.0


def test_against_the_old_policy_the_ratio_is_one_and_the_loss_is_weighted_within_the_limits() -> None:
    behaviour, logprobs = [-3.0, -1.0], [-1.0, -1.1]
    objective = _objective(correction={"type": "tis", "high": 2.0})
    loss, gradient, sums = _run(objective, logprobs, _batch(behaviour, [1.0, -1.0]))
    assert loss == pytest.approx((-2.0 + 0.904837) / 10, abs=1e-5)
    assert gradient == pytest.approx([-0.2, 0.0904837], abs=1e-5)
    assert sums["clipped_low"] == sums["clipped_high"] == 0


def test_recomputed_old_log_probabilities_are_used_where_they_are_given() -> None:
    objective = _objective(correction={"type": "none", "ratio": "old"})
    batch = _batch([-5.0], [1.0], old=torch.tensor([-2.0]))
    loss, gradient, sums = _run(objective, [-1.0], batch)
    assert (loss, gradient) == (pytest.approx(-0.128), [0.0])
    assert sums["kl_old"] == pytest.approx(-1.0)


def test_the_two_ratios_agree_on_policy() -> None:
    logprobs, advantages = [-1.0, -2.0, -0.5], [1.0, -0.5, 0.2]
    plain = _run(_objective(), logprobs, _batch(logprobs, advantages))
    weighted = _run(_objective(max_staleness=0), logprobs, _batch(logprobs, advantages))
    assert plain == weighted


def test_the_reference_penalty_is_added_to_the_loss_and_pulls_back() -> None:
    batch = _batch([-1.0, -2.0], [0.0, 0.0], [-1.5, -1.0])
    loss, gradient, sums = _run(_objective(), [-1.0, -2.0], batch, kl_coef=0.5)
    assert sums["kl_reference"] == pytest.approx(0.1065 + 0.7183, abs=1e-4)
    assert loss == pytest.approx(0.5 * sums["kl_reference"] / 10, abs=1e-6)
    assert gradient[0] > 0 > gradient[1]


def test_a_penalty_in_the_reward_is_measured_but_is_no_term_of_the_loss() -> None:
    batch = _batch([-1.0, -2.0], [0.0, 0.0], [-1.5, -1.0])
    loss, gradient, sums = _run(_objective(kl={"place": "reward"}), [-1.0, -2.0], batch, kl_coef=0.5)
    assert sums["kl_reference"] == pytest.approx(0.8248, abs=1e-4)
    assert (loss, gradient) == (0.0, [0.0, 0.0])


def test_entropy_is_rewarded_by_its_coefficient() -> None:
    loss, gradient, sums = _run(_objective(entropy_coef=0.5), [-1.0, -2.0], _batch([-1.0, -2.0], [0.0, 0.0]))
    assert loss == pytest.approx(-0.5 * (-6.0) / 10)
    assert gradient == pytest.approx([-0.1, -0.1])
    assert sums["entropy"] == -6.0


def test_the_load_balancing_loss_counts_by_the_tokens_of_the_micro_batch() -> None:
    objective = _objective(aux_loss_coef=0.5)
    loss, _, sums = _run(objective, [-1.0, -2.0], _batch([-1.0, -2.0], [0.0, 0.0]), aux_loss=3.0)
    assert loss == pytest.approx(0.5 * 3.0 * 2 / 10)
    assert sums["aux_loss"] == pytest.approx(0.6)


def test_a_dropped_token_has_no_gradient_even_where_its_ratio_is_absurd() -> None:
    objective = _objective(correction={"type": "icepop"})
    loss, gradient, sums = _run(objective, [-1.0, -1.0], _batch([-90.0, -1.0], [1.0, 1.0]))
    assert (loss, gradient) == (pytest.approx(-0.1), pytest.approx([0.0, -0.1]))
    assert sums["dropped"] == 1


def test_an_empty_micro_batch_gives_nothing_and_no_nan() -> None:
    loss, gradient, sums = _run(_objective(), [], _batch([], []), aux_loss=3.0)
    assert loss == 0.0
    assert gradient == []
    assert set(sums.values()) == {0.0}


@pytest.mark.parametrize("loss_type", ["ppo", "cispo", "policy_gradient"])
def test_shares_of_micro_batches_add_up_to_the_whole(loss_type: str) -> None:
    torch.manual_seed(0)
    n = 23
    objective = _objective(loss={"type": loss_type})
    logprobs, behaviour, advantages = torch.randn(n) - 2, torch.randn(n) - 2, torch.randn(n)
    whole = _run(objective, logprobs.tolist(), _batch(behaviour.tolist(), advantages.tolist()))
    parts = [
        _run(objective, p.tolist(), _batch(b.tolist(), a.tolist()))
        for p, b, a in zip(*(torch.split(each, 4) for each in (logprobs, behaviour, advantages)), strict=True)
    ]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(whole[0], abs=1e-6)
    assert [g for _, gradient, _ in parts for g in gradient] == pytest.approx(whole[1], abs=1e-7)
