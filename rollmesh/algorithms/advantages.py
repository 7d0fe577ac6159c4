"""From the rewards of a group's samples to one advantage per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROUP_NORM_EPSILON = 1e-9


def group_norm(rewards: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """GRPO's baseline: ``(R - mean) / (std + 1e-9)`` within each group, with the sample deviation.

    A group of one sample has nothing to be compared with and gets 0. The arithmetic is float64, because the mean of
    equal float32 rewards differs from them in the last bit, which the division by almost 0 would blow up to about 1.

    Args:
        rewards: [S], the samples of group after group.
        group_sizes: samples in each group; they sum to S and may differ.

    Returns:
        float32 [S].

    Raises:
        ValueError: the sizes do not sum to S.
    """
    if sum(group_sizes) != len(rewards):
        raise ValueError(f"group sizes sum to {sum(group_sizes)}, but there are {len(rewards)} rewards")
    advantages = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    start = 0
    for size in group_sizes:
        if size > 1:
            group = rewards[start : start + size].double()
            advantages[start : start + size] = (group - group.mean()) / (group.std() + GROUP_NORM_EPSILON)
        start += size
    return advantages.float()
