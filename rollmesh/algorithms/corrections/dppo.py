"""DPPO (https://arxiv.org/abs/2602.04879): a trust region in divergence instead of in ratio.

The ratio of a rare token is large long before the distribution has changed, and the ratio of a common token is still
small when it has. So the divergence between two-outcome distributions, "this token or another token", decides. A token
beyond the limit is dropped if its gradient would move it further away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies

_LEAST = 1e-12


def binary_divergence(behaviour: Tensor, current: Tensor, kind: str) -> Tensor:
    """Return the divergence of "this token or another token" between μ and π_θ. [N], not negative.

    Args:
        behaviour: [N], log μ.
        current: [N], log π_θ.
        kind: `tv`, ``|π_θ - μ|``; or `kl`, ``μ log(μ / π_θ) + (1 - μ) log((1 - μ) / (1 - π_θ))``.

    Example: μ = 0.5 and π_θ = 0.8 give |0.8 - 0.5| = 0.3, and 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = 0.2231.

        >>> behaviour, current = torch.tensor([0.5]).log(), torch.tensor([0.8]).log()
        >>> binary_divergence(behaviour, current, "tv"), binary_divergence(behaviour, current, "kl")
        (tensor([0.3000], dtype=torch.float64), tensor([0.2231], dtype=torch.float64))
    """
    mu, pi = behaviour.double().exp(), current.double().exp()
    if kind == "tv":
        return (pi - mu).abs()
    rest_mu, rest_pi = (1 - mu).clamp(min=_LEAST), (1 - pi).clamp(min=_LEAST)
    return (mu * (behaviour.double() - current.double()) + rest_mu * (rest_mu / rest_pi).log()).clamp(min=0)


def dppo(policies: Policies, limits: Limits) -> Corrected:
    """Return the anchor μ and the weight 1; 0 for tokens beyond the limit whose gradient moves them further away.

    Example: two tokens went from 0.5 to 0.8. A positive advantage pushes the first further; a negative advantage takes
    the second back.

        >>> from rollmesh.algorithms.segments import Segments
        >>> behaviour, current = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.8]).log()
        >>> ages, advantages, tokens = torch.tensor([1, 1]), torch.tensor([2.0, -2.0]), Segments(torch.tensor([2]))
        >>> policies = Policies(behaviour, current, current, ages, advantages, tokens)
        >>> dppo(policies, Limits(divergence="tv", divergence_limit=0.2)).weights.tolist()
        [0.0, 1.0]
    """
    divergence = binary_divergence(policies.behaviour, policies.current, limits.divergence)
    moves_away = torch.sign(policies.current - policies.behaviour) * torch.sign(policies.advantages) > 0
    is_dropped = moves_away & (divergence > limits.divergence_limit)
    weights = torch.where(is_dropped, 0.0, 1.0).to(policies.behaviour.dtype)
    return Corrected(policies.behaviour, weights)
