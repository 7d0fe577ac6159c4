"""Truncated importance sampling (https://fengyao.notion.site/off-policy-rl; V-trace, https://arxiv.org/abs/1802.01561)."""

from __future__ import annotations

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies, importance_weights


def tis(policies: Policies, limits: Limits) -> Corrected:
    """Ratio against π_old, weighted by π_old / μ within [low, high]."""
    weights = importance_weights(policies.old, policies.behaviour)
    return Corrected(policies.old, weights.clamp(limits.low, limits.high))
