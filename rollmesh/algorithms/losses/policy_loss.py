"""What a policy loss takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rollmesh.algorithms.segments import Segments

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this distance from 0: ``exp`` of more only overflows."""


@dataclass(frozen=True, slots=True)
class Clip:
    """How far the ratio may be from 1.

    Attributes:
        low: lower limit of the ratio is ``1 - low``; None has none.
        high: upper limit is ``1 + high``; None has none.
        dual: limit of the ratio where the advantage is negative; None has none.
    """

    low: float | None = 0.2
    high: float | None = 0.28
    dual: float | None = None

    def __call__(self, ratio: Tensor) -> Tensor:
        """The ratio within its limits."""
        lowest = None if self.low is None else 1.0 - self.low
        highest = None if self.high is None else 1.0 + self.high
        return ratio if lowest is None and highest is None else ratio.clamp(lowest, highest)


class PolicyLoss(NamedTuple):
    """What a policy loss gives for each token.

    Attributes:
        loss: [N], differentiable, to be minimised.
        ratio: [N], detached.
        is_clipped_low: bool [N], the lower limit took the gradient away, or for CISPO cut the weight.
        is_clipped_high: bool [N], the upper limit did, or the dual one.
    """

    loss: Tensor
    ratio: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor


class PolicyLossFunction(Protocol):
    """One policy loss."""

    def __call__(
        self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip
    ) -> PolicyLoss:
        """
        Args:
            logprobs: [N], of the policy in training; differentiable.
            anchor: [N], of the policy the ratio is taken against; no gradient.
            advantages: [N].
            tokens: the generated tokens of each sequence; sequences are whole.
            clip: limits of the ratio.
        """
        ...


def bounded_log_ratio(logprobs: Tensor, anchor: Tensor) -> Tensor:
    """``logprobs - anchor`` within ±20; 0, without gradient, where both are −∞. [N]

    Example: log-probabilities −1 and −1.5 give 0.5; −1 and −∞ give 20.
    """
    both_forbid = torch.isneginf(logprobs) & torch.isneginf(anchor)
    ratio = logprobs.masked_fill(both_forbid, 0.0) - anchor.masked_fill(both_forbid, 0.0)
    return ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> PolicyLoss:
    """``-min(ratio · A, clip(ratio) · A)``; with dual clip never more than ``-dual · A`` where A is negative.

    The dual clip is https://arxiv.org/abs/1912.09729, equation 5.
    """
    surrogate = torch.minimum(ratio * advantages, clip(ratio) * advantages)
    is_low = torch.zeros_like(advantages, dtype=torch.bool)
    is_high = torch.zeros_like(is_low)
    detached = ratio.detach()
    if clip.low is not None:
        is_low = (detached < 1.0 - clip.low) & (advantages < 0)
    if clip.high is not None:
        is_high = (detached > 1.0 + clip.high) & (advantages > 0)
    if clip.dual is not None:
        is_negative = advantages < 0
        surrogate = torch.where(is_negative, torch.maximum(surrogate, clip.dual * advantages), surrogate)
        is_high = is_high | (is_negative & (detached > clip.dual))
    return PolicyLoss(-surrogate, detached, is_low, is_high)
