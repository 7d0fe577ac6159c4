"""From rewards to advantages, against the slow implementation, on random batches."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.algorithms.advantages import ESTIMATORS
from rollmesh.algorithms.comparison import Comparison
from rollmesh.algorithms.config import AdvantageSection, Estimator, MixedVersion, RewardShapingSection
from rollmesh.algorithms.pipeline import Advantages, Trajectories, estimate_advantages, shape_rewards
from rollmesh.algorithms.whitening import RunningMoments, whiten
from tests.unit.algorithms import slow
from tests.unit.algorithms.batches import dtypes, eighths, examples, groups, seeds, segments, trajectories

slow_settings = st.builds(
    slow.Settings,
    estimator=st.sampled_from(get_args(Estimator)),
    mixed_version=st.sampled_from(get_args(MixedVersion)),
    gamma=st.sampled_from([0.5, 0.97, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.9, 1.0]),
    gae_over=st.sampled_from(["generated", "all"]),
    whitening=st.sampled_from(["none", "center", "full"]),
    clip=st.sampled_from([None, (-10.0, 10.0), (-0.5, 0.75)]),
    max_tokens=st.just(6),
    buffer_tokens=st.sampled_from([None, 1, 4]),
    penalty=st.sampled_from([0.0, 1.5]),
    stop_coef=st.sampled_from([None, 0.0, 0.5, -0.4]),
)


def _fast(batch: Trajectories, settings: slow.Settings) -> Advantages:
    shaping = RewardShapingSection(
        overlong_buffer_tokens=settings.buffer_tokens,
        overlong_penalty=settings.penalty,
        stop_properly_coef=settings.stop_coef,
        clip=settings.clip,
    )
    names = ("estimator", "mixed_version", "gamma", "gae_lambda", "gae_over", "whitening")
    section = AdvantageSection.model_validate({name: getattr(settings, name) for name in names})
    rewards = shape_rewards(batch, shaping, settings.max_tokens, RunningMoments())
    return estimate_advantages(batch, rewards, section, shaping.clip)


@examples(200)
@given(groups(), slow_settings, dtypes, st.booleans())
def test_the_whole_way_from_rewards_to_advantages_is_the_slow_one(
    batch: list[slow.Group], settings: slow.Settings, dtype: torch.dtype, has_kl: bool
) -> None:
    fast = trajectories(batch, dtype)
    if not has_kl:
        fast = replace(fast, kl=None)
        batch = [[replace(sample, kl=[]) for sample in group] for group in batch]
    result = _fast(fast, settings)
    advantages, returns = slow.advantages(batch, settings)
    shaped = [
        slow.shaped_reward(s, settings.max_tokens, settings.buffer_tokens, settings.penalty, settings.stop_coef)
        for group in batch
        for s in group
    ]
    assert result.advantages.tolist() == pytest.approx(advantages, rel=1e-5, abs=1e-5)
    assert result.returns.tolist() == pytest.approx(returns, rel=1e-5, abs=1e-5)
    assert result.rewards.tolist() == pytest.approx(shaped, abs=1e-12)


@examples(100)
@given(groups(), st.sampled_from(sorted(ESTIMATORS)), st.sampled_from(get_args(MixedVersion)))
def test_every_baseline_is_the_slow_one_to_the_last_digits(
    batch: list[slow.Group], estimator: str, mixed_version: str
) -> None:
    fast = trajectories(batch)
    comparison = Comparison(fast.groups, fast.versions, mixed_version)
    expected = [
        value
        for group in batch
        for value in slow.baselined(estimator, [s.reward for s in group], [s.version for s in group], mixed_version)
    ]
    # The epsilon of group_norm lets a rounding error of 1e-17 in equal rewards appear as 1e-8.
    assert ESTIMATORS[estimator].baseline(fast.rewards, comparison).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mixed_version", get_args(MixedVersion))
@pytest.mark.parametrize("estimator", ["group_norm", "reinforce_baseline", "rloo"])
def test_how_versions_mix_makes_no_difference_to_a_group_of_one_version(estimator: str, mixed_version: str) -> None:
    rewards, sizes = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0], dtype=torch.float64), segments([3, 2])
    found = [
        ESTIMATORS[estimator].baseline(rewards, Comparison(sizes, torch.tensor(versions), mixed))
        for versions, mixed in (([7, 7, 7, 2, 2], mixed_version), ([1, 2, 3, 4, 5], "allow"))
    ]
    torch.testing.assert_close(found[0], found[1])


def test_a_sample_alone_of_its_version_is_compared_with_none_and_with_less_weight_with_those_of_others() -> None:
    rewards, versions = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([5, 6, 6])
    alone = Comparison(segments([3]), versions, "same_version")
    weighted = Comparison(segments([3]), versions, "weight")
    assert ESTIMATORS["group_norm"].baseline(rewards, alone).tolist() == [0.0, 0.0, 0.0]
    assert weighted.mean(rewards).tolist() == pytest.approx([0.5, 0.2, 0.2])
    assert weighted.mean_of_others(rewards).tolist() == pytest.approx([0.0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
def test_discounted_sums_cross_the_borders_of_blocks_and_not_those_of_sequences(discount: float) -> None:
    generator = np.random.default_rng(0)
    lengths = [0, 1, 63, 64, 0, 65, 128, 129, 4097, 1, 0]
    parts = [generator.normal(size=length) for length in lengths]
    flat = torch.tensor(np.concatenate(parts))
    expected = [x for part in parts for x in slow.discounted_sums([float(x) for x in part], discount)]
    assert segments(lengths).discounted_sums(flat, discount).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-11)
    single = segments(lengths).discounted_sums(flat.float(), discount)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_sequence_of_more_than_a_block_of_blocks_is_summed_whole() -> None:
    ones = torch.ones(300_000, dtype=torch.float64)
    sums = segments([300_000]).discounted_sums(ones, 1.0)
    assert torch.equal(sums, torch.arange(300_000, 0, -1, dtype=torch.float64))


@examples(60)
@given(st.integers(0, 40), seeds, st.booleans(), dtypes, st.sampled_from([0.0, 1e6]))
def test_whitening_is_the_slow_one_even_far_from_zero(
    count: int, seed: int, should_scale: bool, dtype: torch.dtype, shift: float
) -> None:
    values = torch.tensor([shift + x for x in eighths(np.random.default_rng(seed), count)], dtype=dtype)
    result = whiten(values, should_scale)
    assert result.dtype == dtype
    assert result.tolist() == pytest.approx(slow.whitened(values.tolist(), should_scale), rel=1e-5, abs=1e-6)


@examples(60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), seeds)
def test_running_moments_are_those_of_all_rewards_seen(sizes: list[int], seed: int) -> None:
    generator, moments, seen = np.random.default_rng(seed), RunningMoments(), []
    for size in sizes:
        batch = [1e4 + x for x in eighths(generator, size)]
        seen += batch
        moments = moments.merged(torch.tensor(batch, dtype=torch.float64))
    found = moments.normalise(torch.tensor(seen, dtype=torch.float64))
    assert found.tolist() == pytest.approx(slow.whitened(seen, True), rel=1e-6, abs=1e-6)


def test_normalisation_comes_before_the_penalties() -> None:
    sample = slow.Sample(reward=3.0, version=0, offsets=[0, 1, 2, 3], is_truncated=True)
    batch = replace(trajectories([[sample]]), kl=None, values=None)
    shaping = RewardShapingSection(normalize=True, overlong_buffer_tokens=2, stop_properly_coef=0.5)
    rewards = shape_rewards(batch, shaping, 4, RunningMoments(count=10, mean=1.0, squares=40.0))
    assert rewards.tolist() == pytest.approx([((3 - 1) / 2 - 1) * 0.5])


def test_advantages_that_need_a_critic_are_refused_without_its_values() -> None:
    batch = trajectories([[slow.Sample(1.0, 0, [0], values=[0.5], kl=[0.0])]])
    with pytest.raises(ValueError, match="gae needs the values of a critic"):
        estimate_advantages(replace(batch, values=None), batch.rewards, AdvantageSection(estimator="gae"), None)
