"""Decoupled PPO (https://arxiv.org/abs/2110.00641; for language models AReaL, https://arxiv.org/abs/2505.24298).

The trust region is around a recent policy, the proximal policy. An importance weight accounts for the step from μ to
the proximal policy. The proximal policy is π_old, or an interpolation between μ and π_θ by the token's age in versions
(A-3PO, https://arxiv.org/abs/2512.06547). The interpolated policy lags behind π_θ, so that the clip limits something
even with one optimiser step per batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies
from rollmesh.algorithms.ratios import token_ratios


def approximated_proximal(policies: Policies) -> Tensor:
    """Return ``log π_θ + (log μ - log π_θ) / d`` for tokens d versions old, and log π_θ for tokens of age 0. [N]

    Example: log μ = -2 and log π_θ = -1 give -1 at age 0, -2 at age 1 and -1 - 1/4 at age 4.

        >>> from rollmesh.algorithms.segments import Segments
        >>> behaviour, current, ages = torch.full([3], -2.0), torch.full([3], -1.0), torch.tensor([0, 1, 4])
        >>> policies = Policies(behaviour, current, current, ages, torch.ones(3), Segments(torch.tensor([3])))
        >>> approximated_proximal(policies).tolist()
        [-1.0, -2.0, -1.25]
    """
    share = 1.0 / policies.versions_apart.clamp(min=1).to(policies.current.dtype)
    between = torch.lerp(policies.current, policies.behaviour, share)
    return torch.where(policies.versions_apart > 0, between, policies.current)


def decoupled(policies: Policies, limits: Limits) -> Corrected:
    """Return the proximal policy as anchor and the weights proximal / μ; 0 where that weight is above ``high``.

    Example: π_old gives two tokens 6 and 0.8 times the probability that μ gave.

        >>> from rollmesh.algorithms.segments import Segments
        >>> old, behaviour = torch.tensor([0.6, 0.4]).log(), torch.tensor([0.1, 0.5]).log()
        >>> policies = Policies(behaviour, old, old, torch.tensor([1, 1]), torch.ones(2), Segments(torch.tensor([2])))
        >>> decoupled(policies, Limits(high=5.0)).weights
        tensor([0.0000, 0.8000])
    """
    proximal = approximated_proximal(policies) if limits.is_approximated else policies.old
    weights = token_ratios(proximal, policies.behaviour)
    return Corrected(proximal, torch.where(weights <= limits.high, weights, torch.zeros_like(weights)))
