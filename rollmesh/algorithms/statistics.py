"""Distributions over all tokens of a step, on all ranks, by sums alone: a histogram adds up, a quantile does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rollmesh.algorithms.ratios import MAX_LOG_RATIO

NUM_BINS = 2001
"""Equal steps of the logarithm from -20 to 20, one of them centred on 0; a quantile is right to 1 per cent."""
_BIN = 2 * MAX_LOG_RATIO / (NUM_BINS - 1)
_MOMENTS = 3
NUM_WEIGHT_SUMS = _MOMENTS + NUM_BINS
NUM_RESIDUAL_SUMS = 5


def weight_sums(log_weights: Tensor) -> Tensor:
    """What `WeightStatistics` is made of: count, sum and sum of squares of the weights, then a histogram.

    Args:
        log_weights: [N], within ±20.

    Returns:
        float64 [NUM_WEIGHT_SUMS], to be added up over micro-batches and ranks.
    """
    exact = log_weights.detach().double()
    weights = exact.exp()
    moments = torch.stack([weights.new_tensor(float(len(weights))), weights.sum(), weights.square().sum()])
    places = ((exact + MAX_LOG_RATIO) / _BIN).round().long().clamp(0, NUM_BINS - 1)
    return torch.cat([moments, torch.bincount(places, minlength=NUM_BINS).double()])


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """Importance weights of a step.

    Attributes:
        mean: of the weights.
        effective_share: effective sample size over the number of tokens, ``(Σ w)² / (N Σ w²)``: 1 on policy.
        quantiles: by probability.
    """

    mean: float
    effective_share: float
    quantiles: dict[float, float]

    @classmethod
    def from_sums(cls, sums: Tensor, probabilities: tuple[float, ...] = (0.01, 0.5, 0.99)) -> WeightStatistics:
        """From what `weight_sums` gave, added up; 1 everywhere where there are no tokens."""
        count, total, squares = sums[:_MOMENTS].tolist()
        if count == 0:
            return cls(1.0, 1.0, dict.fromkeys(probabilities, 1.0))
        shares = sums[_MOMENTS:].cumsum(0) / count
        quantiles = {}
        for probability in probabilities:
            place = int(torch.searchsorted(shares, shares.new_tensor(probability - 1e-12)))
            quantiles[probability] = math.exp(min(place, NUM_BINS - 1) * _BIN - MAX_LOG_RATIO)
        return cls(total / count, total * total / (count * squares) if squares else 1.0, quantiles)


def residual_sums(values: Tensor, returns: Tensor) -> Tensor:
    """What `explained_variance` is made of: count, then sum and sum of squares of returns and of ``returns - values``.

    Returns:
        float64 [NUM_RESIDUAL_SUMS], to be added up.
    """
    targets = returns.detach().double()
    residuals = targets - values.detach().double()
    count = targets.new_tensor(float(len(targets)))
    return torch.stack([count, targets.sum(), targets.square().sum(), residuals.sum(), residuals.square().sum()])


def explained_variance(sums: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)``: 1 for a perfect critic, 0 for the mean. 0 without variance."""
    count, total, squares, residual, residual_squares = sums.tolist()
    if count == 0:
        return 0.0
    variance = squares / count - (total / count) ** 2
    left = residual_squares / count - (residual / count) ** 2
    return 1.0 - left / variance if variance > 1e-12 else 0.0
