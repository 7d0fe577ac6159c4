"""What an off-policy correction takes and gives.

Three policies are kept apart: the behaviour policy μ that generated a token (recorded), the learner's policy π_old at
the start of the batch, and the policy π_θ in training. A correction says which policy the loss's ratio is taken
against, and with which weight each token counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import bounded_log_ratio
from rollmesh.algorithms.segments import Segments


@dataclass(frozen=True, slots=True)
class Policies:
    """Log-probabilities of N generated tokens under each policy; none has a gradient.

    Attributes:
        behaviour: [N], log μ, recorded by the engine.
        old: [N], log π_old.
        current: [N], log π_θ.
        versions_apart: int64 [N], policy versions between the one that generated the token and π_old's.
        advantages: [N].
        tokens: the generated tokens of each sequence.
        is_kept: bool [N], the tokens that a mask over the whole step keeps (M2PO); None keeps all.
    """

    behaviour: Tensor
    old: Tensor
    current: Tensor
    versions_apart: Tensor
    advantages: Tensor
    tokens: Segments
    is_kept: Tensor | None = None


class Corrected(NamedTuple):
    """What a correction gives.

    Attributes:
        anchor: [N], log-probabilities of the policy that the ratio is taken against.
        weights: [N], of each token's policy loss; 0 drops it, while it stays in the denominator.
    """

    anchor: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the corrections; see `rollmesh.algorithms.variants`."""

    low: float = 0.5
    high: float = 5.0
    is_approximated: bool = False
    divergence: str = "tv"
    divergence_limit: float = 0.2


class Correction(Protocol):
    """One off-policy correction."""

    def __call__(self, policies: Policies, limits: Limits) -> Corrected:
        """The anchor of the ratio and the weight of each token."""
        ...


def importance_weights(policy: Tensor, behaviour: Tensor) -> Tensor:
    """``exp(log policy - log behaviour)``, [N], log-ratios bounded by ±20."""
    return torch.exp(bounded_log_ratio(policy, behaviour))
