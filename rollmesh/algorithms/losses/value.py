"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """``max((V - G)², (V_old + clip(V - V_old, ±clip) - G)²) / 2`` per token, as PPO's implementations have it.

    Args:
        values: [N], of the critic in training; differentiable.
        old_values: [N], of the critic at the start of the batch.
        returns: [N], the targets G.
        clip: how far V may move before its loss stops falling.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2
