"""RLOO (https://arxiv.org/abs/2402.14740): less the mean of the group's other samples."""

from __future__ import annotations

from torch import Tensor

from rollmesh.algorithms.advantages.estimator import AdvantageEstimator
from rollmesh.algorithms.comparison import Comparison


def less_others(rewards: Tensor, comparison: Comparison) -> Tensor:
    """``R - mean of the others``; 0 for a sample without others."""
    return rewards - comparison.mean_of_others(rewards)


RLOO = AdvantageEstimator(baseline=less_others)
