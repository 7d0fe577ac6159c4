"""IcePop (https://arxiv.org/abs/2510.18855): tokens on which trainer and engine disagree too much are dropped."""

from __future__ import annotations

import torch

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies, importance_weights


def icepop(policies: Policies, limits: Limits) -> Corrected:
    """Ratio against π_old, weighted by π_old / μ where that is within [low, high], dropped elsewhere."""
    weights = importance_weights(policies.old, policies.behaviour)
    is_inside = (weights >= limits.low) & (weights <= limits.high)
    return Corrected(policies.old, torch.where(is_inside, weights, torch.zeros_like(weights)))
