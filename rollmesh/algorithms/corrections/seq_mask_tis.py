"""Truncated weights in sequences that are near enough as a whole; the others are dropped.

The geometric mean of a sequence's weights decides, so length does not: log-ratios of −60 and 20 have the mean −20 and
the geometric mean exp(−20). OpenRLHF 0.11's form of it leaves the weights unclamped; here they are clamped as its
comment says.
"""

from __future__ import annotations

import torch

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies, importance_weights
from rollmesh.algorithms.losses.policy_loss import MAX_LOG_RATIO


def seq_mask_tis(policies: Policies, limits: Limits) -> Corrected:
    """Ratio against π_old; weights π_old / μ within [low, high] in sequences whose geometric mean is within it too."""
    mean = policies.tokens.means(policies.old - policies.behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    is_inside = policies.tokens.spread((mean >= limits.low) & (mean <= limits.high))
    weights = importance_weights(policies.old, policies.behaviour).clamp(limits.low, limits.high)
    return Corrected(policies.old, torch.where(is_inside, weights, torch.zeros_like(weights)))
