"""Advantage estimators: from the reward of each sample to the number that its tokens are trained with.

An estimator subtracts a baseline from each sample's reward R. The mean and the deviation are those of the samples of
the same prompt (`Comparison`). `pipeline` then spreads the result over the tokens: as a return, or with a critic's
values as generalised advantages.

====================  =================================  ====================================================
`gae`                 R, then generalised advantages     PPO; GAE is https://arxiv.org/abs/1506.02438
`reinforce`           R, then a discounted return        REINFORCE++, https://arxiv.org/abs/2501.03262
`reinforce_baseline`  R - mean                           REINFORCE++-baseline, the same paper
`group_norm`          (R - mean) / (deviation + 1e-9)    GRPO, https://arxiv.org/abs/2402.03300
`dr_grpo`             R - mean                           Dr. GRPO, https://arxiv.org/abs/2503.20783
`rloo`                R - mean of the other samples      RLOO, https://arxiv.org/abs/2402.14740
====================  =================================  ====================================================

`reinforce_baseline` and `dr_grpo` have the same baseline. REINFORCE++-baseline whitens its advantages over the batch;
Dr. GRPO does not, and divides its loss by a constant (the aggregation `constant`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rollmesh.algorithms.comparison import Comparison
from rollmesh.algorithms.segments import Segments

DEVIATION_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class AdvantageEstimator:
    """The steps in which one estimator differs from the others.

    Attributes:
        baseline: takes rewards float64 [S] and the comparison within groups; returns float64 [S], the rewards less
            their baseline.
        uses_values: a critic's values turn rewards into generalised advantages.
        is_discounted: the configured γ applies; else γ is 1.
    """

    baseline: Callable[[Tensor, Comparison], Tensor]
    uses_values: bool = False
    is_discounted: bool = False


def no_baseline(rewards: Tensor, comparison: Comparison) -> Tensor:
    """Return the rewards unchanged, [S]."""
    return rewards


def subtract_mean(rewards: Tensor, comparison: Comparison) -> Tensor:
    """Return ``R - mean`` within each group, float64 [S].

    Example: a group with rewards 1, 0, 0, 1, whose mean is 0.5.

        >>> rewards, one_version = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64)
        >>> group = Comparison(Segments(torch.tensor([4])), one_version)
        >>> subtract_mean(rewards, group).tolist()
        [0.5, -0.5, -0.5, 0.5]
    """
    return rewards - comparison.mean(rewards)


def subtract_mean_of_others(rewards: Tensor, comparison: Comparison) -> Tensor:
    """Return ``R - mean of the other samples of the group``, float64 [S]; 0 for a sample without others.

    Example: rewards 1, 0, 0, 1. The first sample's others have the mean 1/3.

        >>> rewards, one_version = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64)
        >>> group = Comparison(Segments(torch.tensor([4])), one_version)
        >>> subtract_mean_of_others(rewards, group)
        tensor([ 0.6667, -0.6667, -0.6667,  0.6667], dtype=torch.float64)
    """
    return rewards - comparison.mean_of_others(rewards)


def normalise_in_group(rewards: Tensor, comparison: Comparison) -> Tensor:
    """Return ``(R - mean) / (deviation + 1e-9)`` within each group, float64 [S]. The deviation is the sample's.

    The computation is in float64. In float32 the mean of equal rewards may differ from the rewards in the last bit, and
    the division by almost 0 would turn that difference into an advantage of about 1.

    Example: rewards 1, 0, 0, 1 have the mean 0.5 and the sample deviation 0.5774.

        >>> rewards, one_version = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64)
        >>> group = Comparison(Segments(torch.tensor([4])), one_version)
        >>> normalise_in_group(rewards, group)
        tensor([ 0.8660, -0.8660, -0.8660,  0.8660], dtype=torch.float64)
    """
    return (rewards - comparison.mean(rewards)) / (comparison.deviation(rewards) + DEVIATION_EPSILON)


ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(no_baseline, uses_values=True, is_discounted=True),
    "reinforce": AdvantageEstimator(no_baseline, is_discounted=True),
    "reinforce_baseline": AdvantageEstimator(subtract_mean),
    "group_norm": AdvantageEstimator(normalise_in_group),
    "dr_grpo": AdvantageEstimator(subtract_mean),
    "rloo": AdvantageEstimator(subtract_mean_of_others),
}
"""The estimators by the name that they have in the configuration."""


def generalised_advantages(rewards: Tensor, values: Tensor, tokens: Segments, gamma: float, lam: float) -> Tensor:
    """Return GAE over the generated tokens of each sequence.

    ``δ_j = r_j + γ V_{j+1} - V_j`` and ``A_j = δ_j + γλ A_{j+1}``; V and A are 0 past the end of the sequence. Tokens
    of an environment between generated tokens are no steps.

    Args:
        rewards: float [N], of each generated token.
        values: float [N], the critic's value before each generated token.
        tokens: the generated tokens of each sequence.
        gamma: the discount γ.
        lam: λ.

    Returns:
        float [N].

    Example: one sequence of three tokens, reward 1 at the end, γ = 1, λ = 0.5. δ is 0.5 - 0.25 = 0.25, then
    0.75 - 0.5 = 0.25, then 1 - 0.75 = 0.25. So A is 0.25 at the end, 0.25 + 0.5 · 0.25 = 0.375 before it, and
    0.25 + 0.5 · 0.375 = 0.4375 at the first token.

        >>> rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.25, 0.5, 0.75])
        >>> generalised_advantages(rewards, values, Segments(torch.tensor([3])), gamma=1.0, lam=0.5).tolist()
        [0.4375, 0.375, 0.25]
    """
    return tokens.discounted_sums(rewards + gamma * tokens.next(values) - values, gamma * lam)


def generalised_advantages_over_all(
    rewards: Tensor, values: Tensor, tokens: Segments, offsets: Tensor, gamma: float, lam: float
) -> Tensor:
    """Return GAE with the environment's tokens as steps of reward 0 and value 0, as OpenRLHF does.

    Args:
        rewards: float [N], of each generated token.
        values: float [N], the critic's value before each generated token.
        tokens: the generated tokens of each sequence.
        offsets: int64 [N], the place of each generated token in its response; the places grow within a sequence.
        gamma: the discount γ.
        lam: λ.

    Returns:
        float [N], at the generated tokens.

    Example: two generated tokens with one token of the environment between them, reward 1 at the end, γ = 1, λ = 0.5.
    δ is 0 - 0.25 = -0.25, then 0.75 - 0 = 0.75 at the environment's token, then 1 - 0.75 = 0.25. So A is 0.25 at the
    end, 0.75 + 0.5 · 0.25 = 0.875 before it, and -0.25 + 0.5 · 0.875 = 0.1875 at the first token.

        >>> rewards, values, tokens = torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.75]), Segments(torch.tensor([2]))
        >>> generalised_advantages_over_all(rewards, values, tokens, torch.tensor([0, 2]), gamma=1.0, lam=0.5).tolist()
        [0.1875, 0.25]
    """
    spans = torch.zeros_like(tokens.lengths)
    filled = ~tokens.is_empty
    spans[filled] = offsets[(tokens.ends - 1)[filled]] + 1
    steps = Segments(spans)
    place = tokens.spread(steps.ends - spans) + offsets
    all_rewards, all_values = rewards.new_zeros(steps.size), values.new_zeros(steps.size)
    all_rewards[place], all_values[place] = rewards, values
    return generalised_advantages(all_rewards, all_values, steps, gamma, lam)[place]
