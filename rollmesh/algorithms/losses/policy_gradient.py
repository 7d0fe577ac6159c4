"""The plain policy gradient (Williams, 1992): no ratio, no clip."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import Clip, PolicyLoss, bounded_log_ratio
from rollmesh.algorithms.segments import Segments


def policy_gradient(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """``-A log π_θ``; the ratio is only measured."""
    nowhere = torch.zeros_like(advantages, dtype=torch.bool)
    ratio = torch.exp(bounded_log_ratio(logprobs.detach(), anchor))
    return PolicyLoss(-advantages * logprobs, ratio, nowhere, nowhere)
