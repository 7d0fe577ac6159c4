"""REINFORCE++ (https://arxiv.org/abs/2501.03262): the discounted return itself, whitened over the batch."""

from __future__ import annotations

from rollmesh.algorithms.advantages.estimator import AdvantageEstimator, no_baseline

REINFORCE = AdvantageEstimator(baseline=no_baseline, is_discounted=True)
