"""From one value per token to one number per optimiser step."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mean(values: Tensor, denominator: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """The share of these tokens in a mean over the whole optimiser step: ``sum(values where mask) / denominator``.

    The shares of all micro-batches of all ranks add up to the mean, however the batch was cut. Masked values are
    replaced, not multiplied by 0: what is infinite or NaN there stays out of the sum and of its gradient.

    Args:
        values: [N] or any shape.
        denominator: generated tokens of the whole step, over all micro-batches and ranks.
        mask: bool, shape of ``values``; None counts all.
    """
    if mask is not None:
        values = torch.where(mask, values, torch.zeros_like(values))
    return values.sum() / denominator
