"""Which complete groups are not trained on: DAPO's dynamic sampling. Pure.

A group whose samples all succeed, or all fail, has no gradient under a group estimator, and a batch of such groups
teaches nothing. They end FILTERED, their slots go to the next prompts, and the learner's batches stay full.
(Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from rollmesh.algorithms.config import FilterSection
from rollmesh.types import Sample, Score


def filter_reason(samples: Sequence[Sample], section: FilterSection) -> str | None:
    """Why a group is not to be trained on; None where it is.

    Args:
        samples: of a complete group, scored; those that were invalid are absent and do not count.
        section: the rules. Their limits are exclusive: lo < mean score < hi.
    """
    scores = [_score(sample) for sample in samples]
    if section.score_range is not None:
        # Scores travelled as float32: 0.1 came as 0.10000000149, and is not above a limit of 0.1 for that.
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
