"""Divergence estimates and the coefficient of their penalty."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.algorithms.kl import KL_ESTIMATORS, KLController, kl_estimate
from tests.unit.algorithms import slow
from tests.unit.algorithms.batches import dtypes, examples, logprobs, seeds

estimators = st.sampled_from(sorted(KL_ESTIMATORS))


@examples(100)
@given(estimators, st.integers(0, 20), seeds, dtypes)
def test_estimates_are_the_slow_ones_with_their_clamp(
    estimator: str, count: int, seed: int, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(seed)
    policy, reference = logprobs(generator, count, 12.0), logprobs(generator, count, 12.0)
    found = kl_estimate(estimator, torch.tensor(policy, dtype=dtype), torch.tensor(reference, dtype=dtype))
    expected = [slow.kl(estimator, p, r) for p, r in zip(policy, reference, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@examples(60)
@given(estimators, st.lists(st.integers(-300, 300), min_size=1, max_size=8))
def test_gradients_are_the_differences_of_the_slow_estimates(estimator: str, steps: list[int]) -> None:
    policy = [step / 16 + 0.01 for step in steps]  # off the limits, which lie at 10 and at the root of 20

    def total(moved: list[float]) -> float:
        return math.fsum(slow.kl(estimator, value, 0.0) for value in moved)

    leaf = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(kl_estimate(estimator, leaf, torch.zeros_like(leaf)).sum(), leaf)
    assert found.tolist() == pytest.approx(slow.gradient(total, policy), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("estimator", sorted(KL_ESTIMATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [-math.inf, -1e4, -100.0, -11.0, 11.5, 1e4, math.inf])
def test_outside_the_clamp_estimates_are_finite_and_have_a_gradient_of_0(
    estimator: str, dtype: torch.dtype, log_ratio: float
) -> None:
    leaf = torch.tensor([log_ratio], dtype=dtype, requires_grad=True)
    values = kl_estimate(estimator, leaf, torch.zeros(1, dtype=dtype))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert values.abs().item() == 10
    assert gradient.item() == 0


def test_the_mean_of_k3_over_all_tokens_is_the_divergence() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    divergence = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        mean = (policy * kl_estimate(estimator, policy.log(), reference.log())).sum()
        torch.testing.assert_close(mean, divergence)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_token_that_both_policies_forbid_costs_nothing_and_has_no_gradient(estimator: str) -> None:
    logprobs = torch.tensor([-math.inf, -1.0], requires_grad=True)
    estimates = kl_estimate(estimator, logprobs, torch.tensor([-math.inf, -1.5]))
    estimates.sum().backward()  # type: ignore[no-untyped-call]
    assert estimates[0] == 0.0
    assert estimates[1] > 0.0
    assert logprobs.grad is not None
    assert logprobs.grad[0] == 0.0


@examples(60)
@given(st.floats(0, 1), st.floats(-1, 1), st.floats(1e-3, 1), st.integers(0, 2000), st.integers(1, 10000))
def test_the_adaptive_coefficient_is_the_slow_one(
    coef: float, divergence: float, target: float, num_samples: int, horizon: int
) -> None:
    found = KLController(coef, target, horizon).updated(divergence, num_samples)
    assert found.coef == pytest.approx(slow.adapted(coef, divergence, target, num_samples, horizon))
    assert (found.target, found.horizon) == (target, horizon)
