"""No weights: the ratio alone is the correction, against μ, or there is none, against π_old."""

from __future__ import annotations

import torch

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies


def against_behaviour(policies: Policies, limits: Limits) -> Corrected:
    """Ratio π_θ / μ: with a clipped loss a trust region around the policy that generated."""
    return Corrected(policies.behaviour, torch.ones_like(policies.behaviour))


def against_old(policies: Policies, limits: Limits) -> Corrected:
    """Ratio π_θ / π_old: as if the samples were the learner's own."""
    return Corrected(policies.old, torch.ones_like(policies.old))
