"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return ``max((V - G)², (V_old + clip(V - V_old, ±clip) - G)²) / 2`` per token, as PPO's implementations have it.

    Args:
        values: [N], of the critic in training; differentiable.
        old_values: [N], of the critic at the start of the batch.
        returns: [N], the targets G.
        clip: how far V may move before its loss stops falling.

    Returns:
        [N].

    Example: V moved from 0 to 0.8 towards the target 1, and the clip is 0.5. The loss is that of 0.5, (0.5 - 1)² / 2,
    and has no gradient.

        >>> clipped_value_loss(torch.tensor([0.8]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.5).item()
        0.125
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2
