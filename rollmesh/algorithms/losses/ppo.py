"""PPO's clipped surrogate per token (https://arxiv.org/abs/1707.06347), with a lower and an upper limit."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import Clip, PolicyLoss, bounded_log_ratio, clipped_surrogate
from rollmesh.algorithms.segments import Segments


def ppo(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """``-min(ρ A, clip(ρ) A)`` with ``ρ = π_θ / anchor`` of each token."""
    return clipped_surrogate(torch.exp(bounded_log_ratio(logprobs, anchor)), advantages, clip)
