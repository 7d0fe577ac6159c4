"""The variants of loss and correction: each `type` has the settings that it uses, and no others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt

NonNegativeFloat = Annotated[float, Field(ge=0)]
Aggregation = Literal["token_mean", "sequence_mean", "prompt_mean", "constant"]
Ratio = Literal["auto", "behaviour", "old"]


class _LossSection(Section):
    """How the losses of tokens are averaged; the same for every loss."""

    aggregation: Aggregation = "token_mean"
    constant_tokens: PositiveInt | None = None
    """With `constant`: the number that divides each sequence's sum; none is sampling.max_new_tokens."""


class SurrogateLoss(_LossSection):
    """The clipped surrogate, with the ratio of each token (ppo) or of the whole sequence (gspo)."""

    type: Literal["ppo", "gspo"] = "ppo"
    clip_low: PositiveFloat | None = 0.2
    """Distance below 1 at which the ratio is clipped; none does not clip."""
    clip_high: PositiveFloat | None = 0.28
    """Distance above 1 at which the ratio is clipped; larger than `clip_low`, as in DAPO. None does not clip."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Limit of the ratio where the advantage is negative (3 is usual); none is off."""


class CispoLoss(_LossSection):
    """The policy gradient with the clipped ratio as its weight."""

    type: Literal["cispo"] = "cispo"
    clip_low: PositiveFloat | None = None
    """Distance below 1 at which the ratio is clipped; none does not clip."""
    clip_high: PositiveFloat | None = 4.0
    """Distance above 1 at which the ratio is clipped; none does not clip."""


class PolicyGradientLoss(_LossSection):
    """The plain policy gradient, without a ratio to clip."""

    type: Literal["policy_gradient"] = "policy_gradient"


LOSSES: dict[str, type[SurrogateLoss] | type[CispoLoss] | type[PolicyGradientLoss]] = {
    "ppo": SurrogateLoss,
    "gspo": SurrogateLoss,
    "cispo": CispoLoss,
    "policy_gradient": PolicyGradientLoss,
}
LossSection = Annotated[SurrogateLoss | CispoLoss | PolicyGradientLoss, Field(discriminator="type")]


class AutoCorrection(Section):
    """`none` against the behaviour policy where max_staleness > 0; `tis` where max_staleness is 0, and always for
    policy_gradient."""

    type: Literal["auto"] = "auto"
    ratio: Ratio = "auto"
    """What the loss's ratio is taken against: the policy that generated the token, or the learner's at the start of the
    batch. `behaviour` rules tis out."""
    low: NonNegativeFloat = 0.5
    """Lower end of the importance weights, where `auto` becomes tis."""
    high: PositiveFloat = 5.0
    """Upper end of the importance weights, where `auto` becomes tis."""


class NoCorrection(Section):
    """Every token has the weight 1."""

    type: Literal["none"] = "none"
    ratio: Ratio = "auto"
    """What the loss's ratio is taken against: the policy that generated the token, or the learner's at the start of the
    batch. `auto` is `behaviour` where max_staleness > 0, else `old`."""


class TruncatedCorrection(Section):
    """Importance weights within limits. tis cuts a weight at the limits, icepop drops a token outside the limits, and
    seq_mask_tis cuts weights and drops whole samples outside the limits."""

    type: Literal["tis", "icepop", "seq_mask_tis"]
    low: NonNegativeFloat = 0.5
    """Lower end of the importance weights."""
    high: PositiveFloat = 5.0
    """Upper end of the importance weights."""


class DecoupledCorrection(Section):
    """The ratio against a proximal policy, with the weight proximal / behaviour."""

    type: Literal["decoupled"] = "decoupled"
    high: PositiveFloat = 5.0
    """Upper end of the importance weights."""
    proximal: Literal["recomputed", "approximated"] = "recomputed"
    """The proximal policy. `recomputed`: the model at the start of the batch. `approximated`: an interpolation by the
    token's age in versions."""


class M2poCorrection(Section):
    """Drop the tokens that move the second moment of the log-ratio beyond a limit."""

    type: Literal["m2po"] = "m2po"
    m2_limit: PositiveFloat = 0.04
    """Limit of the mean squared log-ratio over the kept tokens that move away."""


class DppoCorrection(Section):
    """Drop tokens beyond a divergence whose gradient moves them further away."""

    type: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = "tv"
    """The divergence of the two-outcome distribution "this token or another token"."""
    divergence_limit: PositiveFloat = 0.2
    """Divergence beyond which tokens that move further away are dropped; 0.2 suits tv, 0.05 suits kl."""


CorrectionSection = Annotated[
    AutoCorrection | NoCorrection | TruncatedCorrection | DecoupledCorrection | M2poCorrection | DppoCorrection,
    Field(discriminator="type"),
]
