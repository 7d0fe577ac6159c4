"""M2PO (https://arxiv.org/abs/2510.01161): of the tokens that move away from μ, the furthest are dropped until the rest
is near on average.

A token moves away where its advantage and its log-ratio have the same sign: its gradient widens the distance. Tokens
that come back towards μ are all kept. Which tokens go is a question about the whole optimiser step, so it is asked
once, before the first micro-batch, of the policy at the start of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies
from rollmesh.algorithms.losses.policy_loss import MAX_LOG_RATIO, bounded_log_ratio
from rollmesh.algorithms.reduction import SumOverRanks, alone

SEARCH_STEPS = 60
"""Halvings of the interval in which the threshold lies, 0 to 20²: to less than 1e-15."""


def second_moment_mask(
    old: Tensor, behaviour: Tensor, advantages: Tensor, limit: float, sum_over_ranks: SumOverRanks = alone
) -> Tensor:
    """The tokens that stay: those that do not move away, and of the others all whose ``(log π_old - log μ)²`` is at
    most a threshold, the largest with which the mean over these is at most ``limit``. Collective: one sum for each
    step of a bisection.

    Args:
        old: [N], this rank's.
        behaviour: [N].
        advantages: [N].
        limit: mean squared log-ratio that is allowed.
        sum_over_ranks: collective.

    Returns:
        bool [N].
    """
    distance = bounded_log_ratio(old, behaviour).double()
    moves_away = distance * advantages > 0
    squares = distance.square()
    # The mean over the tokens below a threshold grows with the threshold.
    low, high = 0.0, MAX_LOG_RATIO**2 + 1.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        kept = moves_away & (squares <= middle)
        total, count = sum_over_ranks(torch.stack([squares[kept].sum(), kept.sum().double()])).tolist()
        if total <= limit * count:
            low = middle
        else:
            high = middle
    return ~moves_away | (squares <= low)


def m2po(policies: Policies, limits: Limits) -> Corrected:
    """Ratio against μ; the tokens of `second_moment_mask`."""
    weights = torch.ones_like(policies.behaviour)
    if policies.is_kept is not None:
        weights = policies.is_kept.to(weights.dtype)
    return Corrected(policies.behaviour, weights)
