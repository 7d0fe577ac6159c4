"""The policy gradient: plain, or with the clipped ratio as its weight (CISPO). Every token keeps its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import Clip, PolicyLoss
from rollmesh.algorithms.ratios import token_ratios
from rollmesh.algorithms.segments import Segments


def policy_gradient(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """Return ``-A log π_θ`` (Williams, 1992). The ratio is measured and not used.

    Example: a token of log-probability -1 with advantage 2 costs 2.

        >>> logprobs, anchor, tokens = torch.tensor([-1.0]), torch.tensor([-1.5]), Segments(torch.tensor([1]))
        >>> policy_gradient(logprobs, anchor, torch.tensor([2.0]), tokens, Clip()).loss.item()
        2.0
    """
    nowhere = torch.zeros_like(advantages, dtype=torch.bool)
    return PolicyLoss(-advantages * logprobs, token_ratios(logprobs.detach(), anchor), nowhere, nowhere)


def cispo(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """Return ``-clip(ρ) A log π_θ``, ρ without gradient (https://arxiv.org/abs/2506.13585).

    Example: the ratio exp(2) = 7.389 is clipped to 5, so a token of log-probability -1 with advantage 2 costs 10.

        >>> logprobs, anchor, tokens = torch.tensor([-1.0]), torch.tensor([-3.0]), Segments(torch.tensor([1]))
        >>> cispo(logprobs, anchor, torch.tensor([2.0]), tokens, Clip(low=None, high=4.0)).loss.item()
        10.0
    """
    ratio = token_ratios(logprobs.detach(), anchor)
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return PolicyLoss(
        loss=-clip(ratio) * advantages * logprobs,
        ratio=ratio,
        is_clipped_low=nowhere if clip.low is None else ratio < 1.0 - clip.low,
        is_clipped_high=nowhere if clip.high is None else ratio > 1.0 + clip.high,
    )
