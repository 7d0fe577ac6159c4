"""The arguments and the result of an off-policy correction.

Three policies are kept apart: the behaviour policy μ generated a token (the engine recorded its log-probabilities),
the policy π_old is the learner's at the start of the batch, and the policy π_θ is in training. A correction chooses the
policy that the loss's ratio is taken against, and the weight of each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rollmesh.algorithms.segments import Segments


@dataclass(frozen=True, slots=True)
class Policies:
    """Log-probabilities of N generated tokens under each policy, all without gradient.

    Attributes:
        behaviour: [N], log μ, recorded by the engine.
        old: [N], log π_old.
        current: [N], log π_θ.
        versions_apart: int64 [N], policy versions between the version that generated the token and the version of
            π_old.
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
    """The result of a correction.

    Attributes:
        anchor: [N], log-probabilities of the policy that the ratio is taken against.
        weights: [N], of each token's policy loss. The weight 0 drops the token's loss; the token still counts in the
            denominator of the average.
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
    """The signature of an off-policy correction."""

    def __call__(self, policies: Policies, limits: Limits) -> Corrected:
        """Return the anchor of the ratio and the weight of each token."""
        ...
