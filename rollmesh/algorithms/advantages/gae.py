"""Generalised advantage estimation with a critic (https://arxiv.org/abs/1506.02438), as in PPO.

``δ_j = r_j + γ V_{j+1} - V_j`` and ``A_j = δ_j + γλ A_{j+1}``, with V and A 0 past the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.advantages.estimator import AdvantageEstimator, no_baseline
from rollmesh.algorithms.segments import Segments

GAE = AdvantageEstimator(baseline=no_baseline, uses_values=True, is_discounted=True)


def generalised_advantages(rewards: Tensor, values: Tensor, tokens: Segments, gamma: float, lam: float) -> Tensor:
    """GAE over the generated tokens of each sequence; tokens of an environment in between are no steps.

    Args:
        rewards: float [N], of each generated token.
        values: float [N], of the critic before each generated token.
        tokens: the generated tokens of each sequence.
        gamma: discount γ.
        lam: λ.

    Returns:
        float [N].
    """
    return tokens.discounted_sums(rewards + gamma * tokens.next(values) - values, gamma * lam)


def generalised_advantages_over_all(
    rewards: Tensor, values: Tensor, tokens: Segments, offsets: Tensor, gamma: float, lam: float
) -> Tensor:
    """The same with the environment's tokens as steps of value and reward 0, as OpenRLHF does.

    Args:
        offsets: int64 [N], place of each generated token in its response, growing within a sequence.
    """
    spans = torch.zeros_like(tokens.lengths)
    filled = ~tokens.is_empty
    spans[filled] = offsets[(tokens.ends - 1)[filled]] + 1
    steps = Segments(spans)
    place = tokens.spread(steps.ends - spans) + offsets
    all_rewards, all_values = rewards.new_zeros(steps.size), values.new_zeros(steps.size)
    all_rewards[place], all_values[place] = rewards, values
    return generalised_advantages(all_rewards, all_values, steps, gamma, lam)[place]
