"""The policy's loss of one micro-batch, and what the metrics need to know about it.

::

    loss = Σ weight · correction · policy loss  +  mean of (β · KL - c · entropy)  +  a · load balancing
           └ aggregation over the step ┘           └ over all tokens of the step ┘

Three policies are kept apart: the behaviour policy μ that generated (recorded), π_old at the start of the batch, and
the policy π_θ in training. In the first optimiser step of a batch π_old is π_θ itself: its log-probabilities are those
of this very pass without their gradient, and no second pass is made for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.aggregate import weighted_sum
from rollmesh.algorithms.corrections import CORRECTIONS, Limits, Policies
from rollmesh.algorithms.corrections.correction import Corrected
from rollmesh.algorithms.kl import kl_estimate
from rollmesh.algorithms.losses import POLICY_LOSSES, Clip
from rollmesh.algorithms.losses.policy_loss import bounded_log_ratio
from rollmesh.algorithms.statistics import NUM_WEIGHT_SUMS, weight_sums
from rollmesh.algorithms.variants import (
    AutoCorrection,
    CispoLoss,
    CorrectionSection,
    DecoupledCorrection,
    DppoCorrection,
    LossSection,
    SurrogateLoss,
    TruncatedCorrection,
)
from services.config import MeshConfig
from services.learner.batching import MicroBatch

TOKEN_SUMS = (
    "loss",
    "tokens",
    "policy_loss",
    "clipped_low",
    "clipped_high",
    "kl_old",
    "kl_behaviour",
    "entropy",
    "kl_reference",
    "dropped",
    "aux_loss",
)
"""What a pass sums over its tokens, in order; "loss" and "aux_loss" are shares of the step. The importance weights'
sums follow."""
NUM_SUMS = len(TOKEN_SUMS) + NUM_WEIGHT_SUMS


class Objective:
    """The objective of a run, resolved from its configuration.

    Args:
        config: the mesh's configuration.
    """

    def __init__(self, config: MeshConfig) -> None:
        section = config.algorithm
        self._policy_loss = POLICY_LOSSES[section.loss.type]
        self._clip = _clip(section.loss)
        self._correction = CORRECTIONS[section.resolve_correction(config.training.max_staleness)]
        self._limits = _limits(section.correction)
        self._kl_estimator = section.kl.estimator
        self._is_kl_in_loss = section.kl.place == "loss"
        self._entropy_coef = section.entropy_coef
        self._aux_loss_coef = section.aux_loss_coef

    def __call__(
        self, outputs: tuple[Tensor, ...], batch: MicroBatch, num_tokens: float, kl_coef: float
    ) -> tuple[Tensor, Tensor]:
        """The share of a micro-batch in the loss of the step.

        Args:
            outputs: of `PolicyModel`: log-probabilities [N], entropies [N], load-balancing loss.
            batch: the micro-batch of these N tokens.
            num_tokens: generated tokens of the whole step, over all ranks.
            kl_coef: weight of the penalty now.

        Returns:
            The loss, a scalar to be summed over micro-batches and ranks; float64 [NUM_SUMS] on the device, without
            gradient.
        """
        logprobs, entropies, aux_loss = outputs
        columns = batch.columns
        current = logprobs.detach()
        old = current if columns.old is None else columns.old
        corrected = self._corrected(batch, old, current)
        policy = self._policy_loss(logprobs, corrected.anchor, columns.advantages, batch.tokens, self._clip)
        per_token = torch.where(corrected.weights != 0, corrected.weights * policy.loss, torch.zeros_like(policy.loss))
        loss = weighted_sum(per_token, columns.loss_weights)
        kl_reference = torch.zeros_like(current)
        if columns.reference is not None:
            kl = kl_estimate(self._kl_estimator, logprobs, columns.reference)
            kl_reference = kl.detach()
            if self._is_kl_in_loss:
                loss = loss + kl_coef * kl.sum() / num_tokens
        if self._entropy_coef:
            loss = loss - self._entropy_coef * entropies.sum() / num_tokens
        share = aux_loss * (len(current) / num_tokens)
        if self._aux_loss_coef:
            loss = loss + self._aux_loss_coef * share
        over_tokens = (
            torch.ones_like(current),
            per_token.detach(),
            policy.is_clipped_low,
            policy.is_clipped_high,
            old - current,
            columns.behaviour - current,
            entropies.detach(),
            kl_reference,
            corrected.weights == 0,
        )
        summed = [values.sum(dtype=torch.float64) for values in over_tokens]
        ordered = torch.stack([loss.detach().double(), *summed, share.detach().double()])
        return loss, torch.cat([ordered, weight_sums(bounded_log_ratio(current, columns.behaviour))])

    def _corrected(self, batch: MicroBatch, old: Tensor, current: Tensor) -> Corrected:
        columns = batch.columns
        policies = Policies(
            behaviour=columns.behaviour,
            old=old,
            current=current,
            versions_apart=columns.versions_apart,
            advantages=columns.advantages,
            tokens=batch.tokens,
            is_kept=columns.is_kept,
        )
        return self._correction(policies, self._limits)


def _clip(section: LossSection) -> Clip:
    if isinstance(section, SurrogateLoss):
        return Clip(section.clip_low, section.clip_high, section.dual_clip)
    if isinstance(section, CispoLoss):
        return Clip(section.clip_low, section.clip_high, None)
    return Clip(None, None, None)


def _limits(section: CorrectionSection) -> Limits:
    """The settings of the chosen correction; the others are not looked at."""
    if isinstance(section, (AutoCorrection, TruncatedCorrection)):
        return Limits(low=section.low, high=section.high)
    if isinstance(section, DecoupledCorrection):
        return Limits(high=section.high, is_approximated=section.proximal == "approximated")
    if isinstance(section, DppoCorrection):
        return Limits(divergence=section.divergence, divergence_limit=section.divergence_limit)
    return Limits()
