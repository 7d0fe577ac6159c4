"""Policy losses per generated token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this distance from 0: ``exp`` of more only overflows."""


class PolicyLoss(NamedTuple):
    """What a policy loss gives for each token.

    Attributes:
        loss: [N], differentiable, to be minimised.
        ratio: [N], detached.
        is_clipped_low: bool [N], the lower clip took the gradient away.
        is_clipped_high: bool [N], the upper clip did.
    """

    loss: Tensor
    ratio: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> PolicyLoss:
    """PPO's clipped surrogate, ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``.

    https://arxiv.org/abs/1707.06347, with separate lower and upper distances as in https://arxiv.org/abs/2503.14476.

    Args:
        log_ratio: [N], log-probability now minus that of the policy the ratio is taken against; differentiable.
        advantages: [N].
        clip_low: lower clip distance.
        clip_high: upper clip distance.
    """
    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    ratio = ratio.detach()
    return PolicyLoss(
        loss=loss,
        ratio=ratio,
        is_clipped_low=(ratio < 1.0 - clip_low) & (advantages < 0),
        is_clipped_high=(ratio > 1.0 + clip_high) & (advantages > 0),
    )
