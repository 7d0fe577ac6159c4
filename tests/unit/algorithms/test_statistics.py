"""What the metrics say about importance weights and values, from sums that add up over micro-batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rollmesh.algorithms.statistics import WeightStatistics, explained_variance, residual_sums, weight_sums


def test_sums_of_parts_give_the_statistics_of_the_whole() -> None:
    log_weights = torch.tensor(np.random.default_rng(0).normal(0, 0.5, 1000))
    parts = sum((weight_sums(part) for part in log_weights.split(97)), torch.zeros_like(weight_sums(log_weights)))
    found, weights = WeightStatistics.from_sums(parts, (0.01, 0.5, 0.99, 1.0)), log_weights.exp().numpy()
    assert found.mean == pytest.approx(weights.mean())
    assert found.effective_share == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(weights))
    for probability, quantile in found.quantiles.items():
        expected = np.quantile(weights, probability, method="inverted_cdf")
        assert quantile == pytest.approx(expected, rel=0.0101)


def test_on_policy_all_weights_are_1_and_without_tokens_too() -> None:
    for count in (0, 5):
        found = WeightStatistics.from_sums(weight_sums(torch.zeros(count)))
        assert (found.mean, found.effective_share) == (1.0, 1.0)
        assert list(found.quantiles.values()) == pytest.approx([1.0] * 3)


def test_weights_at_the_bounds_stay_in_the_histogram() -> None:
    sums = weight_sums(torch.tensor([-20.0, 20.0]))
    found = WeightStatistics.from_sums(sums, (0.25, 1.0)).quantiles
    assert found[0.25] == pytest.approx(math.exp(-20))
    assert found[1.0] == pytest.approx(math.exp(20))


def test_explained_variance_is_1_for_a_perfect_critic_0_for_the_mean_and_ignores_a_constant_error() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0, 5.0])
    assert explained_variance(residual_sums(returns, returns)) == 1.0
    assert explained_variance(residual_sums(returns + 3, returns)) == pytest.approx(1.0)
    assert explained_variance(residual_sums(torch.full((4,), 3.0), returns)) == pytest.approx(0.0)
    assert explained_variance(residual_sums(torch.zeros(3), torch.ones(3))) == 0.0
    assert explained_variance(residual_sums(torch.zeros(0), torch.zeros(0))) == 0.0


def test_residual_sums_of_parts_add_up() -> None:
    generator = np.random.default_rng(1)
    values, returns = torch.tensor(generator.normal(size=(2, 50)))
    parts = [residual_sums(v, r) for v, r in zip(values.split(7), returns.split(7), strict=True)]
    variance = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert explained_variance(torch.stack(parts).sum(0)) == pytest.approx(variance.item())
