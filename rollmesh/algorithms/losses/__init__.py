"""Policy losses by the name that they have in the configuration, and the critic's loss."""

from __future__ import annotations

from rollmesh.algorithms.losses.policy_gradient import cispo, policy_gradient
from rollmesh.algorithms.losses.policy_loss import Clip, PolicyLoss, PolicyLossFunction
from rollmesh.algorithms.losses.surrogate import gspo, ppo

POLICY_LOSSES: dict[str, PolicyLossFunction] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "policy_gradient": policy_gradient,
}

__all__ = ["POLICY_LOSSES", "Clip", "PolicyLoss", "PolicyLossFunction"]
