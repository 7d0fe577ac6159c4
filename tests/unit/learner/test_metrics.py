"""The metrics of a step on samples with known numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from rollmesh.algorithms.pipeline import Advantages
from rollmesh.types import Group, PolicyVersion, Score, VersionSpan
from services.learner.experience import build_experience
from services.learner.metrics import StepStatistics, StepSums, reduce_statistics
from services.learner.ranks import Ranks
from tests.unit.learner.samples import group, sample

CPU = torch.device("cpu")


def _statistics(groups: Sequence[Group], learner_number: int = 3, largest_ratio: float = 1.0) -> StepStatistics:
    experience = build_experience([groups], needs_reference=False)
    nothing, sums = torch.zeros(experience.num_tokens), StepSums(CPU)
    sums.policy_norms.append(1.0)
    sums.largest_ratio = largest_ratio
    result = Advantages(nothing, nothing, experience.trajectories.rewards)
    return reduce_statistics(experience, result, sums, learner_number, Ranks(0, 1, CPU))


def test_groups_of_several_versions_are_those_whose_tokens_are_of_several() -> None:
    spanning = replace(
        sample(0), version_spans=(VersionSpan(PolicyVersion(0, 1), 0, 1), VersionSpan(PolicyVersion(0, 2), 1, 2))
    )
    groups = [
        group([spanning, replace(spanning, index=1)], 0),  # each sample begins under version 1 and ends under 2
        group([sample(0, version=1), sample(1, version=2)], 1),
        group([sample(0, version=1), sample(1, version=1)], 2),
    ]
    statistics = _statistics(groups)
    assert statistics.metrics["staleness/mixed_groups"] == pytest.approx(2 / 3)
    assert statistics.staleness_histogram == {0: 0, 1: 1, 2: 5}


def test_further_numbers_and_data_sources_have_means_and_counts() -> None:
    tries = replace(sample(0, reward=1.0), score=Score(1.0, 0.5, {"tries": 3.0}))
    groups = [
        replace(
            group([tries, replace(sample(1), score=Score(0.0, 0.0, {"tries": 4.0, "format": 1.0}))], 0), datasource="a"
        ),
        replace(group([sample(0, reward=0.25)], 1), datasource="b"),
        group([sample(0, reward=0.5)], 2),
    ]
    metrics = _statistics(groups).metrics
    assert {name: value for name, value in metrics.items() if name.startswith(("source/", "extra/"))} == {
        "source/a/reward": 0.5,
        "source/a/score": 0.25,
        "source/a/count": 2.0,
        "source/b/reward": 0.25,
        "source/b/score": 0.25,
        "source/b/count": 1.0,
        "extra/tries": 3.5,
        "extra/tries/count": 2.0,
        "extra/format": 1.0,
        "extra/format/count": 1.0,
    }


def test_the_largest_importance_weight_is_told_exactly() -> None:
    statistics = _statistics([group([sample(0), sample(1)])], largest_ratio=1.00002)
    assert statistics.metrics["importance/max"] == 1.00002
