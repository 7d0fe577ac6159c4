"""The loss of a micro-batch against the formulas written out."""

import pytest
import torch

from rollmesh.algorithms.registry import ALGORITHMS
from services.learner.batching import MicroBatch
from services.learner.objective import TOKEN_SUMS, Objective


def _objective(**overrides: object) -> Objective:
    settings: dict[str, object] = {
        "algorithm": ALGORITHMS["grpo"],
        "is_decoupled": False,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "importance_cap": 2.0,
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        **overrides,
    }
    return Objective(**settings)  # type: ignore[arg-type]


def _batch(behaviour: list[float], advantages: list[float], reference: list[float] | None = None) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=nothing,
        position_ids=nothing,
        predictors=nothing,
        targets=nothing,
        behaviour_logprobs=torch.tensor(behaviour),
        reference_logprobs=None if reference is None else torch.tensor(reference),
        advantages=torch.tensor(advantages),
    )


def _run(objective: Objective, logprobs: list[float], batch: MicroBatch) -> tuple[float, list[float], dict[str, float]]:
    leaf = torch.tensor(logprobs, requires_grad=True)
    loss, sums, _ = objective(leaf, torch.ones(len(logprobs)), batch, denominator=10.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return loss.item(), leaf.grad.tolist(), dict(zip(TOKEN_SUMS, sums.tolist(), strict=True))


def test_against_behaviour_the_ratio_is_clipped_and_nothing_is_weighted() -> None:
    behaviour, logprobs = [-2.0, -1.0, -1.0], [-1.0, -1.0, -1.1]
    loss, gradient, sums = _run(_objective(), logprobs, _batch(behaviour, [1.0, 1.0, -1.0]))
    assert loss == pytest.approx((-1.28 - 1.0 + 0.904837) / 10, abs=1e-5)
    assert gradient == pytest.approx([0.0, -0.1, 0.0904837], abs=1e-5)
    assert sums["clipped_high"] == 1
    assert sums["clipped_low"] == 0
    assert sums["kl_behaviour"] == pytest.approx(-0.9, abs=1e-5)


def test_against_the_recomputed_policy_the_ratio_is_one_and_the_loss_is_weighted_up_to_the_cap() -> None:
    behaviour, logprobs = [-2.0, -1.0], [-1.0, -1.1]
    objective = _objective(is_decoupled=True)
    loss, gradient, sums = _run(objective, logprobs, _batch(behaviour, [1.0, -1.0]))
    assert loss == pytest.approx((-2.0 + 0.904837) / 10, abs=1e-5)
    assert gradient == pytest.approx([-0.2, 0.0904837], abs=1e-5)
    assert sums["clipped_low"] == sums["clipped_high"] == 0
    assert sums["weight"] == pytest.approx(2.718282 + 0.904837, abs=1e-4)


def test_the_two_denominators_agree_on_policy() -> None:
    logprobs, advantages = [-1.0, -2.0, -0.5], [1.0, -0.5, 0.2]
    plain = _run(_objective(), logprobs, _batch(logprobs, advantages))
    decoupled = _run(_objective(is_decoupled=True), logprobs, _batch(logprobs, advantages))
    assert plain == decoupled


def test_the_reference_penalty_is_added_to_the_loss_and_pulls_back() -> None:
    objective = _objective(kl_coef=0.5)
    loss, gradient, sums = _run(objective, [-1.0, -2.0], _batch([-1.0, -2.0], [0.0, 0.0], [-1.5, -1.0]))
    assert sums["kl_reference"] == pytest.approx(0.1065 + 0.7183, abs=1e-4)
    assert loss == pytest.approx(0.5 * sums["kl_reference"] / 10, abs=1e-6)
    assert gradient[0] > 0 > gradient[1]


def test_an_empty_micro_batch_gives_nothing_and_no_nan() -> None:
    loss, gradient, sums = _run(_objective(), [], _batch([], []))
    assert loss == 0.0
    assert gradient == []
    assert set(sums.values()) == {0.0}


def test_shares_of_micro_batches_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    n = 23
    logprobs, behaviour, advantages = torch.randn(n) - 2, torch.randn(n) - 2, torch.randn(n)
    whole = _run(_objective(), logprobs.tolist(), _batch(behaviour.tolist(), advantages.tolist()))
    parts = [
        _run(_objective(), p.tolist(), _batch(b.tolist(), a.tolist()))
        for p, b, a in zip(
            *(torch.split(whole_tensor, 4) for whole_tensor in (logprobs, behaviour, advantages)), strict=True
        )
    ]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(whole[0], abs=1e-6)
    assert [g for _, gradient, _ in parts for g in gradient] == pytest.approx(whole[1], abs=1e-7)
