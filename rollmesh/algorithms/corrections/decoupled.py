"""Decoupled PPO (https://arxiv.org/abs/2110.00641; for language models AReaL, https://arxiv.org/abs/2505.24298).

The trust region is around a recent, proximal policy, and the step from μ to it is an importance weight. The proximal
policy is π_old, or is interpolated between μ and π_θ by how many versions lie between them, which makes it lag behind
π_θ and so gives the clip something to do even where there is one optimiser step per batch (A-3PO,
https://arxiv.org/abs/2512.06547).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies, importance_weights


def approximated_proximal(policies: Policies) -> Tensor:
    """``log π_θ + (log μ - log π_θ) / d`` for tokens d versions old; π_θ itself for those of the same version. [N]"""
    share = 1.0 / policies.versions_apart.clamp(min=1).to(policies.current.dtype)
    between = torch.lerp(policies.current, policies.behaviour, share)
    return torch.where(policies.versions_apart > 0, between, policies.current)


def decoupled(policies: Policies, limits: Limits) -> Corrected:
    """Ratio against the proximal policy, weighted by proximal / μ; tokens with a weight above ``high`` are dropped."""
    proximal = approximated_proximal(policies) if limits.is_approximated else policies.old
    weights = importance_weights(proximal, policies.behaviour)
    return Corrected(proximal, torch.where(weights <= limits.high, weights, torch.zeros_like(weights)))
