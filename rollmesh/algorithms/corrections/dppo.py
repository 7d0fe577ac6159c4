"""DPPO (https://arxiv.org/abs/2602.04879): a trust region in divergence instead of in ratio.

A rare token's ratio is large long before the distribution has changed; a common token's is small after it has. So the
divergence between two-outcome distributions, "this token or another", decides. A token beyond the limit is dropped if
its gradient would take it further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies

_LEAST = 1e-12


def binary_divergence(behaviour: Tensor, current: Tensor, kind: str) -> Tensor:
    """Divergence of "this token or another" under π_θ from that under μ. [N], not negative.

    Args:
        behaviour: [N], log μ.
        current: [N], log π_θ.
        kind: `tv`, ``|π_θ - μ|``; or `kl`, ``μ log(μ / π_θ) + (1 - μ) log((1 - μ) / (1 - π_θ))``.
    """
    mu, pi = behaviour.double().exp(), current.double().exp()
    if kind == "tv":
        return (pi - mu).abs()
    rest_mu, rest_pi = (1 - mu).clamp(min=_LEAST), (1 - pi).clamp(min=_LEAST)
    return (mu * (behaviour.double() - current.double()) + rest_mu * (rest_mu / rest_pi).log()).clamp(min=0)


def dppo(policies: Policies, limits: Limits) -> Corrected:
    """Ratio against μ; tokens beyond the limit that would move further away are dropped."""
    divergence = binary_divergence(policies.behaviour, policies.current, limits.divergence)
    moves_away = torch.sign(policies.current - policies.behaviour) * torch.sign(policies.advantages) > 0
    is_dropped = moves_away & (divergence > limits.divergence_limit)
    weights = torch.where(is_dropped, 0.0, 1.0).to(policies.behaviour.dtype)
    return Corrected(policies.behaviour, weights)
