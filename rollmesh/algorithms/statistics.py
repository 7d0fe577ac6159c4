"""Statistics over all tokens of a step, on all ranks, from sums alone.

Histograms of ranks add up, quantiles do not. So each rank counts a histogram, and the quantiles come from the sum.
"""

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
    """Return the sums for `WeightStatistics`: count, sum and sum of squares of the weights, then a histogram.

    Args:
        log_weights: [N], within ±20.

    Returns:
        float64 [NUM_WEIGHT_SUMS], to be added up over micro-batches and ranks.

    Example: the weights 1 and 3 have the sum 4 and the sum of squares 10.

        >>> weight_sums(torch.tensor([1.0, 3.0]).double().log())[:3].round(decimals=6).tolist()
        [2.0, 4.0, 10.0]
    """
    exact = log_weights.detach().double()
    weights = exact.exp()
    moments = torch.stack([weights.new_tensor(float(len(weights))), weights.sum(), weights.square().sum()])
    places = ((exact + MAX_LOG_RATIO) / _BIN).round().long().clamp(0, NUM_BINS - 1)
    return torch.cat([moments, torch.bincount(places, minlength=NUM_BINS).double()])


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """Statistics of the importance weights of a step.

    Attributes:
        mean: the mean weight.
        effective_share: the effective sample size over the number of tokens, ``(Σ w)² / (N Σ w²)``; 1 on policy.
        quantiles: quantiles of the weights, by probability.

    Example: the weights 1 and 3 have the effective share 4² / (2 · 10) = 0.8.

        >>> found = WeightStatistics.from_sums(weight_sums(torch.tensor([1.0, 3.0]).double().log()))
        >>> round(found.mean, 6), round(found.effective_share, 6), found.quantiles[0.5]
        (2.0, 0.8, 1.0)
    """

    mean: float
    effective_share: float
    quantiles: dict[float, float]

    @classmethod
    def from_sums(cls, sums: Tensor, probabilities: tuple[float, ...] = (0.01, 0.5, 0.99)) -> WeightStatistics:
        """Return the statistics from added-up `weight_sums`; every statistic is 1 where there are no tokens."""
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
    """Return the sums for `explained_variance`.

    The sums are the count, the sum and the sum of squares of the returns, and the same two of ``returns - values``.

    Args:
        values: [N], of the critic.
        returns: [N], the critic's targets.

    Returns:
        float64 [NUM_RESIDUAL_SUMS], to be added up over micro-batches and ranks.

    >>> residual_sums(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])).tolist()
    [2.0, 2.0, 4.0, 1.0, 1.0]
    """
    targets = returns.detach().double()
    residuals = targets - values.detach().double()
    count = targets.new_tensor(float(len(targets)))
    return torch.stack([count, targets.sum(), targets.square().sum(), residuals.sum(), residuals.square().sum()])


def explained_variance(sums: Tensor) -> float:
    """Return ``1 - Var(returns - values) / Var(returns)`` from added-up `residual_sums`.

    A perfect critic gets 1, and a critic that always gives the mean gets 0. Returns without variance give 0.

    Example: returns 0 and 2 have the variance 1; residuals 0 and 1 have the variance 0.25.

        >>> explained_variance(residual_sums(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])))
        0.75
    """
    count, total, squares, residual, residual_squares = sums.tolist()
    if count == 0:
        return 0.0
    variance = squares / count - (total / count) ** 2
    left = residual_squares / count - (residual / count) ** 2
    return 1.0 - left / variance if variance > 1e-12 else 0.0
