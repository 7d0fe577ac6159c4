"""GRPO (https://arxiv.org/abs/2402.03300): the group's mean and sample deviation."""

from __future__ import annotations

from torch import Tensor

from rollmesh.algorithms.advantages.estimator import AdvantageEstimator
from rollmesh.algorithms.comparison import Comparison

DEVIATION_EPSILON = 1e-9


def normalised(rewards: Tensor, comparison: Comparison) -> Tensor:
    """``(R - mean) / (deviation + 1e-9)`` within each group.

    In float64, because the mean of equal float32 rewards differs from them in the last bit, which the division by
    almost 0 would blow up to about 1.
    """
    return (rewards - comparison.mean(rewards)) / (comparison.deviation(rewards) + DEVIATION_EPSILON)


GROUP_NORM = AdvantageEstimator(baseline=normalised)
