"""Dr. GRPO (https://arxiv.org/abs/2503.20783): the group's mean without its deviation.

The paper's other half, a constant instead of the length in the loss, is the aggregation `constant`.
"""

from __future__ import annotations

from rollmesh.algorithms.advantages.estimator import AdvantageEstimator
from rollmesh.algorithms.advantages.reinforce_baseline import less_mean

DR_GRPO = AdvantageEstimator(baseline=less_mean)
