"""The policy's loss on one micro-batch, with the sums for metrics.

::

    loss = Σ weight · correction · policy loss  +  mean of (β · KL - c · entropy)  +  a · load balancing
           └ aggregation over the step ┘           └ over all tokens of the step ┘

The formulas distinguish three policies: the behaviour policy μ that generated the tokens, the policy π_old at the start
of the batch, and the policy π_θ in training. The engine recorded the log-probabilities of μ. In the first optimiser
step of a batch π_old is equal to π_θ. So the training pass itself gives the log-probabilities of π_old, without
gradient, and no second pass is made.

The logits of a policy may forbid a token: the token has the log-probability −∞ and no ratio. A token that one of the
three policies forbids is counted, and its policy loss has the weight 0, as for a token that a correction drops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.aggregate import weighted_sum
from rollmesh.algorithms.config import AlgorithmSection
from rollmesh.algorithms.corrections import CORRECTIONS, Limits, Policies
from rollmesh.algorithms.corrections.correction import Corrected
from rollmesh.algorithms.kl import kl_estimate
from rollmesh.algorithms.losses import POLICY_LOSSES, Clip
from rollmesh.algorithms.ratios import bounded_log_ratio
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
    "forbidden",
    "aux_loss",
)
"""Names of the sums over the tokens of a micro-batch, in order. "loss" and "aux_loss" are shares of the step's loss.
The sums of the importance weights follow."""
NUM_SUMS = len(TOKEN_SUMS) + NUM_WEIGHT_SUMS


class Objective:
    """The objective of a run, resolved from its configuration.

    Args:
        section: the algorithm's settings.
        max_staleness: the largest staleness of a sample that the settings permit, in versions. This number decides the
            correction where `algorithm.correction` is auto.
    """

    def __init__(self, section: AlgorithmSection, max_staleness: int) -> None:
        self._policy_loss = POLICY_LOSSES[section.loss.type]
        self._clip = _clip(section.loss)
        self._correction = CORRECTIONS[section.resolve_correction(max_staleness)]
        self._limits = _limits(section.correction)
        self._kl_estimator = section.kl.estimator
        self._is_kl_in_loss = section.kl.place == "loss"
        self._entropy_coef = section.entropy_coef
        self._aux_loss_coef = section.aux_loss_coef
        self._largest_log_ratio: Tensor | None = None

    def __call__(
        self, outputs: tuple[Tensor, ...], batch: MicroBatch, num_tokens: float, kl_coef: float
    ) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's share of the loss of the step.

        Args:
            outputs: the outputs of `PolicyModel`: log-probabilities [N], entropies [N], load-balancing loss.
            batch: the micro-batch of these N tokens.
            num_tokens: generated tokens of the whole step, over all ranks.
            kl_coef: the present coefficient of the KL penalty.

        Returns:
            The share, a scalar; the shares of all micro-batches and ranks add up to the loss. And the sums for metrics,
            float64 [NUM_SUMS] on the device, without gradient.
        """
        logprobs, entropies, aux_loss = outputs
        columns = batch.columns
        old = logprobs.detach() if columns.old is None else columns.old
        forbidden = torch.isneginf(logprobs.detach()) | torch.isneginf(old) | torch.isneginf(columns.behaviour)
        logprobs, old, behaviour = (p.masked_fill(forbidden, 0.0) for p in (logprobs, old, columns.behaviour))
        current = logprobs.detach()
        corrected = self._corrected(batch, behaviour, old, current)
        weights = corrected.weights.masked_fill(forbidden, 0.0)
        policy = self._policy_loss(logprobs, corrected.anchor, columns.advantages, batch.tokens, self._clip)
        per_token = torch.where(weights != 0, weights * policy.loss, torch.zeros_like(policy.loss))
        loss = weighted_sum(per_token, columns.loss_weights)
        kl_reference = torch.zeros_like(current)
        if columns.reference is not None:
            kl = kl_estimate(self._kl_estimator, logprobs, columns.reference.masked_fill(forbidden, 0.0))
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
            behaviour - current,
            entropies.detach(),
            kl_reference,
            weights == 0,
            forbidden,
        )
        summed = [values.sum(dtype=torch.float64) for values in over_tokens]
        ordered = torch.stack([loss.detach().double(), *summed, share.detach().double()])
        log_ratios = bounded_log_ratio(current, behaviour)
        self._note_largest(log_ratios)
        return loss, torch.cat([ordered, weight_sums(log_ratios)])

    def take_largest_ratio(self) -> float:
        """Return the largest ratio π_θ / μ on this rank since the last call; 0 if there was no token."""
        largest, self._largest_log_ratio = self._largest_log_ratio, None
        return 0.0 if largest is None else float(largest.double().exp())

    def _note_largest(self, log_ratios: Tensor) -> None:
        if len(log_ratios):
            known = self._largest_log_ratio
            self._largest_log_ratio = log_ratios.max() if known is None else torch.maximum(known, log_ratios.max())

    def _corrected(self, batch: MicroBatch, behaviour: Tensor, old: Tensor, current: Tensor) -> Corrected:
        columns = batch.columns
        policies = Policies(
            behaviour=behaviour,
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
    """Return the bounds that the chosen correction has in its settings."""
    if isinstance(section, (AutoCorrection, TruncatedCorrection)):
        return Limits(low=section.low, high=section.high)
    if isinstance(section, DecoupledCorrection):
        return Limits(high=section.high, is_approximated=section.proximal == "approximated")
    if isinstance(section, DppoCorrection):
        return Limits(divergence=section.divergence, divergence_limit=section.divergence_limit)
    return Limits()
