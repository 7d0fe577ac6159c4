"""The loss of one micro-batch, and what the metrics need to know about it.

Three policies are kept apart: the behaviour policy μ that generated (recorded), the proximal policy π_old at the start
of the batch, and the policy π_θ in training. There is one optimiser step per batch, so π_old is π_θ before that step:
its log-probabilities are those of this very pass without their gradient, and no second pass is made for them.

=============  =======================  =============================================
denominator    ratio                    weight of the policy loss
=============  =======================  =============================================
behaviour      π_θ / μ, clipped         1
recomputed     π_θ / π_old, clipped     min(π_old / μ, importance_cap), no gradient
=============  =======================  =============================================

loss = token mean of (weight · policy loss + kl.coef · KL(π_θ, reference)), over the whole optimiser step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollmesh.algorithms.aggregate import token_mean
from rollmesh.algorithms.importance import importance_weights, truncated_weights
from rollmesh.algorithms.kl import kl_estimate
from rollmesh.algorithms.registry import ALGORITHMS, Algorithm
from services.config import MeshConfig
from services.learner.batching import MicroBatch

TOKEN_SUMS = ("loss", "policy_loss", "clipped_low", "clipped_high", "kl_behaviour", "entropy", "kl_reference", "weight")
"""What `Objective.__call__` sums over tokens, in order."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The objective of a run, resolved from its configuration.

    Attributes:
        algorithm: advantages and policy loss.
        is_decoupled: the ratio is taken against π_old with truncated weights, not against μ.
        clip_low: lower clip distance.
        clip_high: upper clip distance.
        importance_cap: upper end of the truncated weights.
        kl_coef: 0 without reference.
        kl_estimator: name in `rollmesh.algorithms.kl`.
    """

    algorithm: Algorithm
    is_decoupled: bool
    clip_low: float
    clip_high: float
    importance_cap: float
    kl_coef: float
    kl_estimator: str

    @classmethod
    def from_config(cls, config: MeshConfig) -> Objective:
        section = config.algorithm
        return cls(
            algorithm=ALGORITHMS[section.type],
            is_decoupled=config.ratio_denominator == "recomputed",
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            importance_cap=section.importance_cap,
            kl_coef=section.kl.coef,
            kl_estimator=section.kl.estimator,
        )

    def __call__(
        self, logprobs: Tensor, entropies: Tensor, batch: MicroBatch, denominator: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The share of a micro-batch in the loss of the step.

        Args:
            logprobs: float32 [N], differentiable.
            entropies: float32 [N].
            batch: the micro-batch of these N tokens.
            denominator: generated tokens of the whole step, over all ranks.

        Returns:
            The loss, a scalar to be summed over micro-batches and ranks; float64 [len(TOKEN_SUMS)], sums over tokens;
            float64 scalar, the largest importance weight (0 for an empty micro-batch). The last two stay on the
            device and have no gradient.
        """
        old_logprobs = logprobs.detach()
        behaviour = batch.behaviour_logprobs
        policy = self.algorithm.policy_loss(
            logprobs - (old_logprobs if self.is_decoupled else behaviour),
            batch.advantages,
            self.clip_low,
            self.clip_high,
        )
        policy_loss = policy.loss
        if self.is_decoupled:
            policy_loss = policy_loss * truncated_weights(old_logprobs, behaviour, self.importance_cap)
        loss = policy_loss
        kl_reference = torch.zeros_like(old_logprobs)
        if batch.reference_logprobs is not None:
            kl = kl_estimate(self.kl_estimator, logprobs, batch.reference_logprobs)
            loss = loss + self.kl_coef * kl
            kl_reference = kl.detach()
        weights = importance_weights(old_logprobs, behaviour)
        per_token = (
            loss.detach(),
            policy_loss.detach(),
            policy.is_clipped_low,
            policy.is_clipped_high,
            behaviour - old_logprobs,
            entropies,
            kl_reference,
            weights,
        )
        sums = torch.stack([values.sum(dtype=torch.float64) for values in per_token])
        largest = torch.cat([weights, weights.new_zeros(1)]).max().double()
        return token_mean(loss, denominator), sums, largest
