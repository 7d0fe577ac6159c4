"""The variants of loss and correction: each `type` has the settings that the variant uses, and no other settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt

NonNegativeFloat = Annotated[float, Field(ge=0)]
Aggregation = Literal["token_mean", "sequence_mean", "prompt_mean", "constant"]
Ratio = Literal["auto", "behaviour", "old"]


class _LossSection(Section):
    """Settings of the average over the losses of tokens; every loss has them."""

    aggregation: Aggregation = "token_mean"
    """The weight of each token's loss. token_mean: all tokens alike. sequence_mean: all sequences alike. prompt_mean:
    all groups alike. constant: a sequence's sum is divided by `constant_tokens`, and all sequences count alike."""
    constant_tokens: PositiveInt | None = None
    """The number that divides the sum of each sequence, with aggregation constant; null is sampling.max_new_tokens."""


class SurrogateLoss(_LossSection):
    """Settings of the clipped surrogate loss, with the ratio of each token (ppo) or of the whole sequence (gspo)."""

    type: Literal["ppo", "gspo"] = "ppo"
    """The ratio that is clipped. ppo: the ratio of each token. gspo: the ratio of the whole sequence."""
    clip_low: PositiveFloat | None = 0.2
    """How far below 1 the ratio is clipped: 0.2 clips at 0.8. null sets no lower limit."""
    clip_high: PositiveFloat | None = 0.28
    """How far above 1 the ratio is clipped: 0.28 clips at 1.28. The default is larger than that of `clip_low`, as in
    DAPO. null sets no upper limit."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """The limit of the ratio where the advantage is negative; 3 is usual. null sets no limit."""


class CispoLoss(_LossSection):
    """Settings of the policy gradient with a clipped weight: the clipped ratio, without gradient."""

    type: Literal["cispo"] = "cispo"
    """cispo: the policy gradient with the clipped ratio as its weight."""
    clip_low: PositiveFloat | None = None
    """How far below 1 the ratio is clipped: 0.2 clips at 0.8. null sets no lower limit."""
    clip_high: PositiveFloat | None = 4.0
    """How far above 1 the ratio is clipped: 4 clips at 5. null sets no upper limit."""


class PolicyGradientLoss(_LossSection):
    """Settings of the plain policy gradient, which has no ratio to clip."""

    type: Literal["policy_gradient"] = "policy_gradient"
    """policy_gradient: the plain policy gradient."""


LOSSES: dict[str, type[SurrogateLoss] | type[CispoLoss] | type[PolicyGradientLoss]] = {
    "ppo": SurrogateLoss,
    "gspo": SurrogateLoss,
    "cispo": CispoLoss,
    "policy_gradient": PolicyGradientLoss,
}
LossSection = Annotated[SurrogateLoss | CispoLoss | PolicyGradientLoss, Field(discriminator="type")]


class AutoCorrection(Section):
    """The choice of a correction by training.max_staleness.

    Above 0 the correction is `none`, with the ratio against the behaviour policy. At 0 the correction is `tis`, except
    for the loss gspo. The loss policy_gradient always gets `tis`.
    """

    type: Literal["auto"] = "auto"
    """auto: `none` or `tis`, by training.max_staleness."""
    ratio: Ratio = "auto"
    """The policy in the denominator of the loss's ratio. behaviour: the policy that generated the token; it rules tis
    out. old: the learner's policy at the start of the batch. auto: behaviour where training.max_staleness > 0, else
    old."""
    low: NonNegativeFloat = 0.5
    """The lower limit of the importance weights, where `auto` becomes tis."""
    high: PositiveFloat = 5.0
    """The upper limit of the importance weights, where `auto` becomes tis."""


class NoCorrection(Section):
    """The choice of no correction: each token has the weight 1."""

    type: Literal["none"] = "none"
    """none: each token has the weight 1."""
    ratio: Ratio = "auto"
    """The policy in the denominator of the loss's ratio. behaviour: the policy that generated the token. old: the
    learner's policy at the start of the batch. auto: behaviour where training.max_staleness > 0, else old."""


class TruncatedCorrection(Section):
    """Settings of importance weights within limits: the learner's policy at the start of the batch over the behaviour
    policy."""

    type: Literal["tis", "icepop", "seq_mask_tis"]
    """What the limits do. tis: a weight is cut at the limits. icepop: a token outside the limits is dropped.
    seq_mask_tis: weights are cut, and a sample is dropped whose geometric mean is outside the limits."""
    low: NonNegativeFloat = 0.5
    """The lower limit of the importance weights."""
    high: PositiveFloat = 5.0
    """The upper limit of the importance weights."""


class DecoupledCorrection(Section):
    """Settings of a ratio against a proximal policy, with the weight proximal / behaviour."""

    type: Literal["decoupled"] = "decoupled"
    """decoupled: the ratio is taken against a proximal policy."""
    high: PositiveFloat = 5.0
    """The upper limit of the importance weights; a token with a larger weight is dropped."""
    proximal: Literal["recomputed", "approximated"] = "recomputed"
    """The proximal policy. recomputed: the learner's policy at the start of the batch. approximated: an interpolation
    between the behaviour policy and the policy in training, by the token's age in versions."""


class M2poCorrection(Section):
    """Settings of the limit on the second moment of the log-ratio."""

    type: Literal["m2po"] = "m2po"
    """m2po: the tokens furthest from the behaviour policy are dropped, until the others are within `m2_limit`."""
    m2_limit: PositiveFloat = 0.04
    """The limit of the mean squared log-ratio. The mean is over the kept tokens whose gradient moves them further
    away."""


class DppoCorrection(Section):
    """Settings of the limit on the divergence of a token."""

    type: Literal["dppo"] = "dppo"
    """dppo: a token beyond `divergence_limit` is dropped if its gradient would move it further away."""
    divergence: Literal["tv", "kl"] = "tv"
    """The divergence between two-outcome distributions, "this token or another token". tv: total variation. kl:
    Kullback-Leibler."""
    divergence_limit: PositiveFloat = 0.2
    """The divergence from the behaviour policy beyond which a token may be dropped. 0.2 suits tv, 0.05 suits kl."""


CorrectionSection = Annotated[
    AutoCorrection | NoCorrection | TruncatedCorrection | DecoupledCorrection | M2poCorrection | DppoCorrection,
    Field(discriminator="type"),
]
