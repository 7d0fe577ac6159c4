"""The algorithms by the name they have in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rollmesh.algorithms.advantages import group_norm
from rollmesh.algorithms.loss import PolicyLoss, clipped_surrogate


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What makes an algorithm.

    Attributes:
        advantages: rewards [S] and group sizes to advantages [S].
        policy_loss: log-ratios [N], advantages [N], lower and upper clip distance to a loss per token.
    """

    advantages: Callable[[Tensor, Sequence[int]], Tensor]
    policy_loss: Callable[[Tensor, Tensor, float, float], PolicyLoss]


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(advantages=group_norm, policy_loss=clipped_surrogate),
}
"""`grpo` is https://arxiv.org/abs/2402.03300 with the token mean of https://arxiv.org/abs/2503.14476."""
