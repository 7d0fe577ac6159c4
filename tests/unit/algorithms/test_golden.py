"""The formulas against numbers that were computed by hand or that OpenRLHF gives."""

from __future__ import annotations

import math

import pytest
import torch

from rollmesh.algorithms.advantages import generalised_advantages, generalised_advantages_over_all
from rollmesh.algorithms.config import AdvantageSection
from rollmesh.algorithms.corrections import CORRECTIONS, Limits, Policies
from rollmesh.algorithms.kl import KLController, kl_estimate
from rollmesh.algorithms.losses import POLICY_LOSSES, Clip
from rollmesh.algorithms.losses.value import clipped_value_loss
from rollmesh.algorithms.pipeline import Trajectories, estimate_advantages
from rollmesh.algorithms.rewards import overlong_penalty, stop_properly
from tests.unit.algorithms.batches import segments

CLIP = Clip(0.2, 0.28, dual=3.0)


def _trajectories(rewards: list[float], group_sizes: list[int], tokens_each: int = 3) -> Trajectories:
    count = len(rewards)
    return Trajectories(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        groups=segments(group_sizes),
        tokens=segments([tokens_each] * count),
        offsets=torch.arange(tokens_each).repeat(count),
        versions=torch.zeros(count, dtype=torch.int64),
        is_truncated=torch.zeros(count, dtype=torch.bool),
    )


def _advantages(estimator: str, rewards: list[float], group_sizes: list[int]) -> torch.Tensor:
    batch = _trajectories(rewards, group_sizes)
    section = AdvantageSection.model_validate({"estimator": estimator})
    return estimate_advantages(batch, batch.rewards, section, (-10.0, 10.0)).advantages.view(-1, 3)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("group_norm", [-0.70711, 0.70711, 0.70711, -0.70711]),
        ("rloo", [-0.6, 0.6, 1.0, -1.0]),
        ("dr_grpo", [-0.3, 0.3, 0.5, -0.5]),
        ("reinforce_baseline", [-0.7276, 0.7276, 1.2127, -1.2127]),
        ("reinforce", [-0.6019, 0.8427, 1.0835, -1.3242]),
    ],
)
def test_every_token_of_two_groups_of_two_has_the_advantage_that_openrlhf_gives_it(
    estimator: str, expected: list[float]
) -> None:
    advantages = _advantages(estimator, [0.3, 0.9, 1.0, 0.0], [2, 2])
    torch.testing.assert_close(advantages, torch.tensor(expected)[:, None].expand(4, 3), atol=5e-5, rtol=0)


def test_group_norm_uses_the_sample_deviation() -> None:
    advantages = _advantages("group_norm", [1.0, 0.0, 0.0, 0.0], [4])[:, 0]
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["group_norm", "rloo", "dr_grpo"])
def test_a_group_of_one_sample_has_no_advantage(estimator: str) -> None:
    assert (_advantages(estimator, [0.7, 1.0, 0.0], [1, 2])[0] == 0).all()


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 1e6 + 0.1, -0.7])
def test_equal_rewards_give_no_advantage_however_they_round(reward: float) -> None:
    rounded = torch.tensor(reward, dtype=torch.float32).item()
    for size in range(2, 12):
        assert _advantages("group_norm", [rounded] * size, [size]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("lam", "over_all", "over_generated"),
    [
        (1.0, [0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8]),
        (0.9, [0.1655, 0.2950, 0.6200, 0.8000], [0.3122, 0.458, 0.62, 0.8]),
    ],
)
def test_gae_over_all_tokens_is_openrlhfs_and_over_generated_tokens_an_environment_costs_nothing(
    lam: float, over_all: list[float], over_generated: list[float]
) -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    tokens, offsets = segments([4]), torch.tensor([1, 2, 5, 6])
    every = generalised_advantages_over_all(rewards, values, tokens, offsets, 1.0, lam)
    generated = generalised_advantages(rewards, values, tokens, 1.0, lam)
    torch.testing.assert_close(every, torch.tensor(over_all, dtype=torch.float64), atol=5e-5, rtol=0)
    torch.testing.assert_close(generated, torch.tensor(over_generated, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(2.0, 1.0, -1.28), (2.0, -1.0, 2.0), (5.0, -1.0, 3.0), (0.5, -1.0, 0.8), (0.5, 1.0, -0.5)],
)
def test_ppo_takes_the_worse_of_plain_and_clipped_ratio_and_stops_at_the_dual_limit(
    ratio: float, advantage: float, loss: float
) -> None:
    logprobs, advantages = torch.tensor([math.log(ratio) - 2]), torch.tensor([advantage])
    result = POLICY_LOSSES["ppo"](logprobs, torch.tensor([-2.0]), advantages, segments([1]), CLIP)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)


def test_gspo_clips_the_sequences_ratio_and_gives_it_to_each_token() -> None:
    logprobs = torch.tensor([0.1, 0.3], dtype=torch.float64)
    result = POLICY_LOSSES["gspo"](
        logprobs, torch.zeros_like(logprobs), torch.ones_like(logprobs), segments([2, 0]), Clip(3e-4, 4e-4)
    )
    assert result.loss.tolist() == pytest.approx([-1.0004, -1.0004], abs=1e-9)
    assert result.ratio.tolist() == pytest.approx([math.exp(0.2)] * 2)


def test_cispo_weighs_the_log_probability_with_the_clipped_ratio() -> None:
    logprobs = torch.log(torch.tensor([0.5, 0.5]))
    anchor = torch.log(torch.tensor([0.05, 0.25]))
    result = POLICY_LOSSES["cispo"](logprobs, anchor, torch.ones(2), segments([2]), Clip(None, 4.0))
    assert result.loss.tolist() == pytest.approx([5 * math.log(2), 2 * math.log(2)])
    assert result.is_clipped_high.tolist() == [True, False]


def test_the_critics_loss_is_the_worse_of_clipped_and_free() -> None:
    loss = clipped_value_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.2]), 0.5)
    assert loss.item() == pytest.approx(0.32)


@pytest.mark.parametrize(
    ("correction", "loss"),
    [("tis", -2.75), ("icepop", 0.0), ("seq_mask_tis", -2.75), ("none", -1.0), ("decoupled", -0.05)],
)
def test_two_tokens_with_weights_10_and_a_tenth_are_truncated_or_dropped(correction: str, loss: float) -> None:
    old, advantages = torch.zeros(2), torch.ones(2)
    policies = Policies(
        behaviour=-torch.log(torch.tensor([10.0, 0.1])),
        old=old,
        current=old,
        versions_apart=torch.ones(2, dtype=torch.int64),
        advantages=advantages,
        tokens=segments([2]),
    )
    corrected = CORRECTIONS[correction, "old"](policies, Limits())
    policy = POLICY_LOSSES["ppo"](old, corrected.anchor, advantages, segments([2]), CLIP)
    assert (corrected.weights * policy.loss).mean().item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [0.1065, 0.7183])]
)
def test_kl_estimators_match_openrlhfs(estimator: str, expected: list[float]) -> None:
    values = kl_estimate(estimator, torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    torch.testing.assert_close(values, torch.tensor(expected), atol=5e-5, rtol=0)


def test_the_adaptive_coefficient_moves_by_a_fifth_of_the_batchs_share_of_the_horizon_at_most() -> None:
    controller = KLController(0.1, target=0.05, horizon=1000)
    assert controller.updated(1.0, 100).coef == pytest.approx(0.1 * 1.02)
    assert controller.updated(0.0, 100).coef == pytest.approx(0.1 * 0.98)
    assert controller.updated(0.055, 100).coef == pytest.approx(0.1 * 1.01)
    assert KLController(0.1).updated(1.0, 100).coef == 0.1


def test_dapos_penalty_grows_through_the_buffer_and_stays_at_its_end() -> None:
    penalties = overlong_penalty(torch.tensor([0, 80, 81, 90, 100, 130]), 100, 20, 2.0)
    assert penalties.tolist() == pytest.approx([0.0, 0.0, -0.1, -1.0, -2.0, -2.0])


@pytest.mark.parametrize(("coef", "expected"), [(0.5, [1.0, 1.0]), (0.0, [0.0, 1.0]), (-0.3, [-0.3, 1.0])])
def test_a_cut_answers_reward_is_scaled_or_replaced(coef: float, expected: list[float]) -> None:
    rewards = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert stop_properly(rewards, torch.tensor([True, False]), coef).tolist() == pytest.approx(expected)
