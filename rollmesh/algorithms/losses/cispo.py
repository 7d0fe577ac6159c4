"""CISPO (https://arxiv.org/abs/2506.13585): the ratio is a clipped weight; no token loses its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import Clip, PolicyLoss, bounded_log_ratio
from rollmesh.algorithms.segments import Segments


def cispo(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """``-clip(ρ) A log π_θ``, ρ without gradient."""
    ratio = torch.exp(bounded_log_ratio(logprobs.detach(), anchor))
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return PolicyLoss(
        loss=-clip(ratio) * advantages * logprobs,
        ratio=ratio,
        is_clipped_low=nowhere if clip.low is None else ratio < 1.0 - clip.low,
        is_clipped_high=nowhere if clip.high is None else ratio > 1.0 + clip.high,
    )
