"""Importance weights between the policy that generated a token and the policy that trains on it."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.loss import MAX_LOG_RATIO


def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """``exp(logp - behaviour)`` per token, [N], without gradient and without a cap."""
    return torch.exp((logprobs.detach() - behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def truncated_weights(logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights ``min(exp(logp - behaviour), cap)``, [N], without gradient.

    The truncation bounds the variance, as in V-trace (https://arxiv.org/abs/1802.01561).
    """
    return importance_weights(logprobs, behaviour_logprobs).clamp(max=cap)
