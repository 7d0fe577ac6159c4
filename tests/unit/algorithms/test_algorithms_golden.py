"""The formulas against values computed by hand."""

import math

import pytest
import torch

from rollmesh.algorithms.advantages import group_norm
from rollmesh.algorithms.aggregate import token_mean
from rollmesh.algorithms.importance import importance_weights, truncated_weights
from rollmesh.algorithms.kl import KL_ESTIMATORS, kl_estimate
from rollmesh.algorithms.loss import clipped_surrogate
from rollmesh.algorithms.registry import ALGORITHMS


def test_group_norm_of_two_groups_of_two_is_plus_minus_one_over_root_two() -> None:
    advantages = group_norm(torch.tensor([0.3, 0.9, 1.0, 0.0]), [2, 2])
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantages, torch.tensor([-half, half, half, -half]), atol=1e-5, rtol=0)


def test_group_norm_uses_the_sample_deviation() -> None:
    advantages = group_norm(torch.tensor([1.0, 0.0, 0.0, 0.0]), [4])
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)


def test_group_norm_allows_groups_of_unequal_sizes() -> None:
    rewards = torch.tensor([0.2, 0.7, 0.1, 0.9, 0.4])
    together = group_norm(rewards, [3, 2])
    apart = torch.cat([group_norm(rewards[:3], [3]), group_norm(rewards[3:], [2])])
    assert torch.equal(together, apart)


def test_a_group_of_one_sample_has_no_advantage() -> None:
    assert group_norm(torch.tensor([0.7, 1.0, 0.0]), [1, 2])[0] == 0


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 1e6 + 0.1, -0.7])
def test_equal_rewards_give_no_advantage_however_they_round(reward: float) -> None:
    for size in range(2, 12):
        assert group_norm(torch.full((size,), reward, dtype=torch.float32), [size]).abs().max() < 1e-3


def test_group_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 3, but there are 4"):
        group_norm(torch.zeros(4), [2, 1])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(2.0, 1.0, -1.28), (2.0, -1.0, 2.0), (0.5, -1.0, 0.8), (0.5, 1.0, -0.5)]
)
def test_clipped_surrogate_matches_the_reference_values(ratio: float, advantage: float, loss: float) -> None:
    result = clipped_surrogate(torch.tensor([math.log(ratio)]), torch.tensor([advantage]), 0.2, 0.28)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)


def test_a_token_outside_the_clip_range_has_no_gradient_and_is_counted_on_its_side() -> None:
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    result = clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.2, 0.28)
    result.loss.sum().backward()  # type: ignore[no-untyped-call]
    assert log_ratio.grad is not None
    assert (log_ratio.grad == 0).tolist() == [True, True, False, False]
    assert result.is_clipped_high.tolist() == [True, False, False, False]
    assert result.is_clipped_low.tolist() == [False, True, False, False]


def test_an_absurd_log_ratio_stays_finite() -> None:
    result = clipped_surrogate(torch.tensor([1e4, -1e4]), torch.tensor([-1.0, 1.0]), 0.2, 0.28)
    assert result.loss.isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [0.1065, 0.7183])]
)
def test_kl_estimators_match_the_reference_values(estimator: str, expected: list[float]) -> None:
    values = kl_estimate(estimator, torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    torch.testing.assert_close(values, torch.tensor(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize("estimator", sorted(KL_ESTIMATORS))
def test_kl_estimates_are_clamped_and_have_no_gradient_outside(estimator: str) -> None:
    logprobs = torch.tensor([-30.0, -1.0], requires_grad=True)
    values = kl_estimate(estimator, logprobs, torch.tensor([-1.0, -1.1]))
    assert values.abs().max() <= 10
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert logprobs.grad[0] == 0
    assert logprobs.grad[1] != 0


def test_importance_weights_are_truncated_from_above_only_and_carry_no_gradient() -> None:
    logprobs = torch.log(torch.tensor([0.9, 0.01])).requires_grad_()
    behaviour = torch.log(torch.tensor([0.09, 0.1]))
    torch.testing.assert_close(importance_weights(logprobs, behaviour), torch.tensor([10.0, 0.1]))
    truncated = truncated_weights(logprobs, behaviour, cap=2.0)
    torch.testing.assert_close(truncated, torch.tensor([2.0, 0.1]))
    assert not truncated.requires_grad


def test_shares_of_the_token_mean_add_up_however_the_tokens_are_cut() -> None:
    values = torch.randn(37, dtype=torch.float64)
    shares = torch.stack([token_mean(part, 37) for part in torch.split(values, 5)]).sum()
    torch.testing.assert_close(shares, values.mean())


def test_a_masked_token_does_not_touch_mean_or_gradient_even_if_it_is_infinite() -> None:
    values = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    mean = token_mean(values, 2.0, mask=torch.tensor([True, False, False]))
    mean.backward()  # type: ignore[no-untyped-call]
    assert mean.item() == 0.5
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.0]


def test_the_registry_knows_grpo() -> None:
    assert ALGORITHMS["grpo"].advantages is group_norm
