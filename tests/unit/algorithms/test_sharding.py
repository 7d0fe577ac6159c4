"""What comes out does not depend on which rank holds which groups, nor on their order."""

from __future__ import annotations

from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rollmesh.algorithms.aggregate import token_weights
from rollmesh.algorithms.config import AdvantageSection, Estimator, MixedVersion
from rollmesh.algorithms.corrections.m2po import second_moment_mask
from rollmesh.algorithms.pipeline import estimate_advantages
from rollmesh.algorithms.reduction import SumOverRanks, alone
from rollmesh.algorithms.variants import Aggregation
from rollmesh.algorithms.whitening import RunningMoments
from tests.unit.algorithms import slow
from tests.unit.algorithms.batches import cut, examples, groups, logprobs, on_ranks, seeds, trajectories

places = st.lists(st.integers(0, 5), min_size=1, max_size=2)
"""Where a batch is cut: two or three ranks, some of them possibly without groups."""
sections = st.builds(
    AdvantageSection,
    estimator=st.sampled_from(get_args(Estimator)),
    mixed_version=st.sampled_from(get_args(MixedVersion)),
    gae_lambda=st.just(0.9),
    whitening=st.sampled_from(["none", "center", "full"]),
)


def _advantages(
    batch: list[slow.Group], section: AdvantageSection, sum_over_ranks: SumOverRanks = alone
) -> torch.Tensor:
    tensors = trajectories(batch)
    return estimate_advantages(tensors, tensors.rewards, section, (-10.0, 10.0), sum_over_ranks).advantages


@examples(60)
@given(groups(), places, sections)
def test_advantages_are_the_same_on_any_number_of_ranks(
    batch: list[slow.Group], at: list[int], section: AdvantageSection
) -> None:
    parts = cut(batch, at)
    found = on_ranks([lambda total, part=part: _advantages(part, section, total) for part in parts])
    torch.testing.assert_close(torch.cat(found), _advantages(batch, section), rtol=1e-6, atol=1e-6)


@examples(60)
@given(groups(), places, st.sampled_from(get_args(Aggregation)))
def test_token_weights_are_the_same_on_any_number_of_ranks(
    batch: list[slow.Group], at: list[int], aggregation: str
) -> None:
    def weights(part: list[slow.Group], total: SumOverRanks) -> torch.Tensor:
        tensors = trajectories(part)
        return token_weights(aggregation, tensors.tokens, tensors.groups, 9, total)

    found = on_ranks([lambda total, part=part: weights(part, total) for part in cut(batch, at)])
    assert torch.equal(torch.cat(found), weights(batch, alone))


@examples(30)
@given(st.integers(1, 20), places, seeds)
def test_the_second_moment_mask_is_the_same_on_any_number_of_ranks(count: int, at: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    old, behaviour = logprobs(generator, count), logprobs(generator, count)
    advantages = generator.normal(size=count).tolist()
    expected, margin = slow.second_moment_mask(old, behaviour, advantages, 0.04)
    assume(margin > 1e-9)
    parts = zip(cut(old, at), cut(behaviour, at), cut(advantages, at), strict=True)
    shares = [tuple(torch.tensor(values, dtype=torch.float64) for values in part) for part in parts]
    found = on_ranks([lambda total, share=share: second_moment_mask(*share, 0.04, total) for share in shares])
    assert torch.cat(found).tolist() == expected


@examples(30)
@given(groups(), places)
def test_running_moments_are_the_same_on_every_rank_and_those_of_the_whole_batch(
    batch: list[slow.Group], at: list[int]
) -> None:
    whole = RunningMoments(3, 0.5, 2.0).merged(trajectories(batch).rewards)
    shares = [trajectories(part).rewards for part in cut(batch, at)]
    found = on_ranks([lambda total, share=share: RunningMoments(3, 0.5, 2.0).merged(share, total) for share in shares])
    for moments in found:
        assert moments == found[0]
        assert (moments.count, moments.mean, moments.squares) == pytest.approx((whole.count, whole.mean, whole.squares))


@examples(60)
@given(groups(), sections, st.randoms(use_true_random=False))
def test_groups_in_another_order_have_the_same_advantages(
    batch: list[slow.Group], section: AdvantageSection, random: Random
) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)
    sizes = [sum(len(sample.offsets) for sample in group) for group in batch]
    found = _advantages(batch, section).split(sizes)
    permuted = _advantages([batch[i] for i in order], section)
    torch.testing.assert_close(permuted, torch.cat([found[i] for i in order]), rtol=1e-6, atol=1e-6)
