"""The filter decides which groups are trained on: strict limits, float32, and no variance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rollmesh.algorithms.config import FilterSection
from rollmesh.types import PolicyVersion, PromptId, Sample, Score, StopReason, Turn, VersionSpan
from services.rollout.filtering import filter_reason

BETWEEN = FilterSection(score_range=(0.0, 1.0))
VARIED = FilterSection(should_drop_zero_variance=True)


def _group(scores: Sequence[float], rewards: Sequence[float] | None = None) -> list[Sample]:
    """Samples as they come over the wire: scores and rewards are float32."""
    prompt, pairs = PromptId("train", 0, 0), zip(scores, rewards or scores, strict=True)
    return [
        Sample(
            sample_id=f"{prompt}/{index}/0",
            index=index,
            prompt_id=prompt,
            prompt_token_ids=np.zeros(1, np.int32),
            response_token_ids=np.zeros(1, np.int32),
            turns=(Turn(1, 0, StopReason.STOP),),
            behaviour_logprobs=np.zeros(1, np.float32),
            version_spans=(VersionSpan(PolicyVersion(0, 0), 0, 1),),
            score=Score(reward=float(np.float32(reward)), score=float(np.float32(score))),
        )
        for index, (score, reward) in enumerate(pairs)
    ]


def test_a_mean_score_at_either_limit_is_filtered_with_the_limit_named() -> None:
    assert filter_reason(_group([0, 0, 0, 0]), BETWEEN) == "mean score 0 is not above 0"
    assert filter_reason(_group([1, 1, 1, 1]), BETWEEN) == "mean score 1 is not below 1"
    assert filter_reason(_group([0.25, 0.75]), FilterSection(score_range=(0.5, 1))) == "mean score 0.5 is not above 0.5"


def test_one_sample_that_differs_is_enough_to_be_inside() -> None:
    assert filter_reason(_group([1] + 63 * [0]), BETWEEN) is None
    assert filter_reason(_group(63 * [1] + [0]), BETWEEN) is None


def test_a_mean_outside_is_filtered_however_far() -> None:
    assert filter_reason(_group([-3, -1]), BETWEEN) == "mean score -2 is not above 0"
    assert filter_reason(_group([2, 1]), BETWEEN) == "mean score 1.5 is not below 1"


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("num_samples", [1, 3, 7, 8])
def test_scores_equal_to_a_limit_are_not_inside_although_they_travelled_as_float32(
    limit: float, num_samples: int
) -> None:
    samples = _group(num_samples * [limit])
    assert filter_reason(samples, FilterSection(score_range=(limit, 2.0))) is not None
    assert filter_reason(samples, FilterSection(score_range=(-1.0, limit))) is not None


def test_the_range_looks_at_scores_and_the_variance_at_rewards() -> None:
    same_rewards = _group([0, 1], rewards=[0.5, 0.5])
    assert filter_reason(same_rewards, BETWEEN) is None
    assert filter_reason(same_rewards, VARIED) == "all rewards are 0.5"
    same_scores = _group([1, 1], rewards=[0.5, 0.75])
    assert filter_reason(same_scores, VARIED) is None
    assert filter_reason(same_scores, BETWEEN) == "mean score 1 is not below 1"


def test_a_single_sample_has_a_mean_and_no_variance() -> None:
    assert filter_reason(_group([0.5]), BETWEEN) is None
    assert filter_reason(_group([0.5]), VARIED) == "all rewards are 0.5"


def test_without_a_rule_every_group_is_trained() -> None:
    assert filter_reason(_group([1, 1]), FilterSection()) is None
