"""Corrections without weights: the ratio alone corrects (against μ), or nothing does (against π_old)."""

from __future__ import annotations

import torch

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies


def against_behaviour(policies: Policies, limits: Limits) -> Corrected:
    """Return the anchor μ. With a clipped loss, the ratio π_θ / μ is a trust region around the generating policy."""
    return Corrected(policies.behaviour, torch.ones_like(policies.behaviour))


def against_old(policies: Policies, limits: Limits) -> Corrected:
    """Return the anchor π_old: the samples are treated as if the learner's own policy had generated them."""
    return Corrected(policies.old, torch.ones_like(policies.old))
