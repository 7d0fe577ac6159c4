"""Advantage estimators, one file each, by the name they have in the configuration."""

from __future__ import annotations

from rollmesh.algorithms.advantages.dr_grpo import DR_GRPO
from rollmesh.algorithms.advantages.estimator import AdvantageEstimator
from rollmesh.algorithms.advantages.gae import GAE
from rollmesh.algorithms.advantages.group_norm import GROUP_NORM
from rollmesh.algorithms.advantages.reinforce import REINFORCE
from rollmesh.algorithms.advantages.reinforce_baseline import REINFORCE_BASELINE
from rollmesh.algorithms.advantages.rloo import RLOO

ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": GAE,
    "reinforce": REINFORCE,
    "reinforce_baseline": REINFORCE_BASELINE,
    "group_norm": GROUP_NORM,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
}

__all__ = ["ESTIMATORS", "AdvantageEstimator"]
