"""Decides which complete groups are not trained on: DAPO's dynamic sampling. Pure functions.

A group whose samples all succeed, or all fail, has no gradient under a group estimator. A batch of such groups teaches
nothing. These groups end FILTERED, their slots go to the next prompts, and the learner's batches stay full.
(Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from rollmesh.algorithms.config import FilterSection
from rollmesh.types import Sample, Score


def filter_reason(samples: Sequence[Sample], section: FilterSection) -> str | None:
    """Return the reason why a group is left out of training; None where the group is trained on.

    With ``score_range`` (0.1, 0.9), scores of 0, 1, 1, 1 have the mean 0.75 and pass; four scores of 1 do not.

    Args:
        samples: the scored samples of a complete group. Invalid samples are absent and do not count.
        section: the rules. The limits are exclusive: low < mean score < high.
    """
    scores = [_score(sample) for sample in samples]
    if section.score_range is not None:
        # Scores travel as float32: 0.1 arrives as 0.10000000149, and must not count as above a limit of 0.1.
        mean, low, high = map(np.float32, (statistics.fmean(s.score for s in scores), *section.score_range))
        if not mean > low:
            return f"mean score {mean:g} is not above {low:g}"
        if not mean < high:
            return f"mean score {mean:g} is not below {high:g}"
    if section.should_drop_zero_variance and len({score.reward for score in scores}) == 1:
        return f"all rewards are {scores[0].reward:g}"
    return None


def _score(sample: Sample) -> Score:
    assert sample.score is not None
    return sample.score
