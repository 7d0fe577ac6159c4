"""M2PO (https://arxiv.org/abs/2510.01161): drop the tokens furthest from μ until the others are near μ on average.

Only tokens that move away from μ are dropped. A token moves away where its advantage and its log-ratio have the same
sign: its gradient widens the distance. The choice depends on all tokens of the optimiser step. So the learner makes the
choice once, before the first micro-batch, with the policy at the start of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies
from rollmesh.algorithms.ratios import MAX_LOG_RATIO, bounded_log_ratio
from rollmesh.algorithms.reduction import SumOverRanks, alone

SEARCH_STEPS = 60
"""Halvings of the interval 0 to 20² + 1 in which the threshold lies: to less than 1e-15."""


def second_moment_mask(
    old: Tensor, behaviour: Tensor, advantages: Tensor, limit: float, sum_over_ranks: SumOverRanks = alone
) -> Tensor:
    """Return which tokens are kept. Collective: one sum for each step of a bisection.

    Tokens that do not move away from μ are kept. A token that moves away is kept where ``(log π_old - log μ)²`` is at
    most a threshold. The threshold is the largest with which the mean of these squares over the kept tokens that move
    away is at most ``limit``.

    Args:
        old: [N], log π_old of this rank's tokens.
        behaviour: [N], log μ.
        advantages: [N].
        limit: the mean squared log-ratio that is allowed.
        sum_over_ranks: collective.

    Returns:
        bool [N].

    Example: four tokens with advantage 1 and the log-ratios 0.1, 0.2, 0.4 and -0.9. The last comes back to μ and stays.
    The squares of the others are 0.01, 0.04 and 0.16: the mean of all three is 0.07, that of the first two is 0.025.

        >>> old, behaviour = torch.tensor([-0.9, -0.8, -0.6, -1.9]), torch.full([4], -1.0)
        >>> second_moment_mask(old, behaviour, torch.ones(4), limit=0.04).tolist()
        [True, True, False, True]
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
    """Return the anchor μ, and the weight 1 for the tokens that `second_moment_mask` keeps, 0 for the others.

    >>> from rollmesh.algorithms.segments import Segments
    >>> ages, advantages, tokens = torch.tensor([1, 1]), torch.ones(2), Segments(torch.tensor([2]))
    >>> behaviour, old, is_kept = torch.full([2], -1.0), torch.tensor([-0.9, -0.2]), torch.tensor([True, False])
    >>> m2po(Policies(behaviour, old, old, ages, advantages, tokens, is_kept), Limits()).weights.tolist()
    [1.0, 0.0]
    """
    weights = torch.ones_like(policies.behaviour)
    if policies.is_kept is not None:
        weights = policies.is_kept.to(weights.dtype)
    return Corrected(policies.behaviour, weights)
