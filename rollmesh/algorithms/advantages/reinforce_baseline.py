"""REINFORCE++-baseline (https://arxiv.org/abs/2501.03262): less the group's mean, then whitened over the batch."""

from __future__ import annotations

from torch import Tensor

from rollmesh.algorithms.advantages.estimator import AdvantageEstimator
from rollmesh.algorithms.comparison import Comparison


def less_mean(rewards: Tensor, comparison: Comparison) -> Tensor:
    """``R - mean`` within each group."""
    return rewards - comparison.mean(rewards)


REINFORCE_BASELINE = AdvantageEstimator(baseline=less_mean)
