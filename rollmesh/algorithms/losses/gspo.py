"""GSPO (https://arxiv.org/abs/2507.18071): one ratio for a whole sequence, the geometric mean of its tokens' ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import MAX_LOG_RATIO, Clip, PolicyLoss, clipped_surrogate
from rollmesh.algorithms.segments import Segments


def gspo(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """``-min(s A, clip(s) A)`` with ``s = exp(mean over the sequence of log ratios)`` for all of its tokens."""
    mean = tokens.means(logprobs - anchor).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clipped_surrogate(tokens.spread(torch.exp(mean)), advantages, clip)
