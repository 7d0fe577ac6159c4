"""The arguments and the result of a policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rollmesh.algorithms.segments import Segments


@dataclass(frozen=True, slots=True)
class Clip:
    """How far the ratio may be from 1.

    Attributes:
        low: the lower limit of the ratio is ``1 - low``; None sets no lower limit.
        high: the upper limit of the ratio is ``1 + high``; None sets no upper limit.
        dual: limit of the ratio where the advantage is negative; None sets none.
    """

    low: float | None = 0.2
    high: float | None = 0.28
    dual: float | None = None

    def __call__(self, ratio: Tensor) -> Tensor:
        """Return the ratio within its limits.

        >>> import torch
        >>> Clip(low=0.2, high=0.28)(torch.tensor([0.5, 1.0, 2.0]))
        tensor([0.8000, 1.0000, 1.2800])
        """
        lowest = None if self.low is None else 1.0 - self.low
        highest = None if self.high is None else 1.0 + self.high
        return ratio if lowest is None and highest is None else ratio.clamp(lowest, highest)


class PolicyLoss(NamedTuple):
    """The loss of each token, and what the limits did to it.

    Attributes:
        loss: [N], differentiable, to be minimised.
        ratio: [N], detached.
        is_clipped_low: bool [N], the lower limit took the token's gradient away; for CISPO it changed the weight.
        is_clipped_high: bool [N], the same of the upper limit, or of the dual clip.
    """

    loss: Tensor
    ratio: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor


class PolicyLossFunction(Protocol):
    """The signature of a policy loss."""

    def __call__(
        self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip
    ) -> PolicyLoss:
        """Return the loss of each token.

        Args:
            logprobs: [N], of the policy in training; differentiable.
            anchor: [N], log-probabilities of the policy that the ratio is taken against; no gradient.
            advantages: [N].
            tokens: the generated tokens of each sequence; the sequences are whole.
            clip: limits of the ratio.
        """
        ...
