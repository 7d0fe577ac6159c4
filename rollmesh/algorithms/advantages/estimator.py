"""What an advantage estimator is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rollmesh.algorithms.comparison import Comparison


@dataclass(frozen=True, slots=True)
class AdvantageEstimator:
    """One way from rewards to advantages; the parts that differ.

    Attributes:
        baseline: rewards float64 [S] and the comparison within groups to rewards less their baseline, float64 [S].
        uses_values: the return is bootstrapped from a critic (generalised advantage estimation).
        is_discounted: γ of the configuration applies; else it is 1.
    """

    baseline: Callable[[Tensor, Comparison], Tensor]
    uses_values: bool = False
    is_discounted: bool = False


def no_baseline(rewards: Tensor, comparison: Comparison) -> Tensor:
    """Rewards as they are."""
    return rewards
