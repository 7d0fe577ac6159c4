"""The objective's section of the mesh file.

The import of this module needs no torch: every service imports the module, and only some services have torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rollmesh.algorithms.presets import PRESETS
from rollmesh.algorithms.variants import (
    LOSSES,
    AutoCorrection,
    CorrectionSection,
    DecoupledCorrection,
    DppoCorrection,
    LossSection,
    M2poCorrection,
    NoCorrection,
    NonNegativeFloat,
    SurrogateLoss,
    TruncatedCorrection,
)
from rollmesh.config.section import Section, merge
from rollmesh.config.shared import NonNegativeInt, PositiveFloat, PositiveInt
from rollmesh.errors import ConfigError

UnitFloat = Annotated[float, Field(ge=0, le=1)]

Estimator = Literal["gae", "reinforce", "reinforce_baseline", "group_norm", "dr_grpo", "rloo"]
MixedVersion = Literal["allow", "same_version", "weight"]

GROUP_ESTIMATORS = ("reinforce_baseline", "group_norm", "dr_grpo", "rloo")
"""The estimators that compare the samples of a prompt with each other; they need more than one sample."""

ESTIMATOR_SETTINGS = {
    "gamma": ("gae", "reinforce"),
    "gae_lambda": ("gae",),
    "gae_over": ("gae",),
    "mixed_version": GROUP_ESTIMATORS,
}
"""The settings of the advantage section that have an effect with some estimators only."""


class RewardShapingSection(Section):
    """Settings that change a reward before advantages are computed. They apply in the order of the fields."""

    normalize: bool = False
    """Subtract the running mean of all rewards so far, and divide by their running deviation. This suits reward
    models."""
    overlong_buffer_tokens: PositiveInt | None = None
    """The length of the buffer of DAPO's overlong penalty, in tokens below sampling.max_new_tokens. In the buffer the
    penalty grows from 0 to `overlong_penalty`. With max_new_tokens 100, a buffer of 20 and a penalty of 1, an answer of
    85 tokens loses 0.25. null sets no penalty."""
    overlong_penalty: NonNegativeFloat = 1.0
    """The largest overlong penalty, which is subtracted from the reward of the longest answer; without effect where
    `overlong_buffer_tokens` is null."""
    stop_properly_coef: Annotated[float, Field(le=1)] | None = None
    """ProRL's penalty for answers that are cut at the limit of tokens. A number from 0 to 1 multiplies their reward; a
    negative number replaces their reward. null sets no penalty."""
    clip: tuple[float, float] | None = (-10.0, 10.0)
    """The limits of the reward after the group's baseline is subtracted, as in OpenRLHF. null sets no limits."""


class AdvantageSection(Section):
    """Settings that turn rewards into advantages."""

    estimator: Estimator = "group_norm"
    """The estimator of advantages. gae: generalised advantage estimation, with a critic. reinforce: the discounted
    return. The others subtract a baseline from the reward R. reinforce_baseline, dr_grpo: R less the group's mean.
    group_norm: that, divided by the group's deviation. rloo: R less the mean of the group's other samples."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The discount γ of each generated token, for gae and reinforce. The other estimators use 1."""
    gae_lambda: UnitFloat = 1.0
    """λ of generalised advantage estimation, for gae."""
    gae_over: Literal["generated", "all"] = "generated"
    """The tokens that are steps of gae. generated: the generated tokens; an environment's answer does not decay credit.
    all: all tokens of the response, as in OpenRLHF. The two agree where λ and γ are 1."""
    whitening: Literal["auto", "none", "center", "full"] = "auto"
    """The normalisation of advantages over all generated tokens of the batch, on all ranks. center: the mean is
    subtracted. full: the result is also divided by the deviation. auto: full for gae, reinforce and reinforce_baseline,
    and none for the other estimators."""
    mixed_version: MixedVersion = "allow"
    """The comparison of a group's samples that began under different policy versions. allow: all samples alike.
    same_version: only samples of the same version. weight: each sample with the weight 1 / (1 + versions apart)."""

    @property
    def should_whiten(self) -> bool:
        """Whether advantages are whitened at all."""
        return self._whitening != "none"

    @property
    def should_scale(self) -> bool:
        """Whether whitening divides by the deviation."""
        return self._whitening == "full"

    @property
    def _whitening(self) -> str:
        if self.whitening != "auto":
            return self.whitening
        return "full" if self.estimator in ("gae", "reinforce", "reinforce_baseline") else "none"


class ResolvedCorrection(NamedTuple):
    """The off-policy correction of a run, with every `auto` replaced by its value.

    Attributes:
        type: the type of the correction.
        ratio: the policy in the denominator of the loss's ratio: "behaviour" or "old".
    """

    type: str
    ratio: str


class KLSection(Section):
    """Settings of the penalty for distance from the reference policy."""

    coef: NonNegativeFloat = 0.0
    """The coefficient β of the penalty. 0 means no penalty and no reference service."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """The estimator of the divergence, from Δ = log π - log π_ref. k1: Δ, which belongs in the reward. k2: Δ² / 2.
    k3: exp(-Δ) - 1 + Δ."""
    place: Literal["loss", "reward"] = "loss"
    """The place of the penalty. loss: a term of the loss, with gradient. reward: subtracted from every token's reward,
    without gradient."""
    target: PositiveFloat | None = None
    """The divergence towards which the coefficient adapts; null keeps the coefficient."""
    horizon: PositiveInt = 10000
    """The number of samples over which the coefficient adapts, where `target` is set. A larger number is slower."""


class FilterSection(Section):
    """Settings that choose the complete groups to train on. A new prompt replaces each group that is left out."""

    score_range: tuple[float, float] | None = None
    """The range of DAPO's dynamic sampling: a group is kept if its mean score lies strictly between the two numbers.
    null keeps all groups."""
    should_drop_zero_variance: bool = False
    """Leave out groups whose samples all have the same reward; such a group has no gradient under group estimators."""

    @property
    def is_on(self) -> bool:
        """Whether the filter may leave out a group."""
        return self.score_range is not None or self.should_drop_zero_variance


class AlgorithmSection(Section):
    """The objective: a preset, and every setting of the preset."""

    type: Literal["ppo", "reinforce++", "reinforce++-baseline", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"] = (
        "grpo"
    )
    """The preset, which gives the defaults of the settings below; the file may set each of them. The presets are in
    docs/algorithms.md."""
    reward: RewardShapingSection = RewardShapingSection()
    """Settings that change a reward before advantages are computed."""
    advantage: AdvantageSection = AdvantageSection()
    """The estimator of advantages, and its settings."""
    loss: LossSection = SurrogateLoss()
    """The policy's loss of each token, and the average over tokens."""
    correction: CorrectionSection = AutoCorrection()
    """The off-policy correction, for the difference between the policy that generated a token and the policy in
    training."""
    kl: KLSection = KLSection()
    """The penalty for distance from the reference policy."""
    filter: FilterSection = FilterSection()
    """Settings that choose the complete groups to train on."""
    entropy_coef: NonNegativeFloat = 0.0
    """The weight of the entropy bonus in the loss. With 0 the entropy is measured and not rewarded."""
    aux_loss_coef: NonNegativeFloat = 0.0
    """The weight of the load-balancing loss of a mixture-of-experts model. 0 leaves this loss out."""
    value_clip: PositiveFloat = 0.5
    """The distance that the critic's value may move from its value at the start of the batch; beyond it the critic's
    loss stops falling."""
    policy_frozen_steps: NonNegativeInt = 0
    """The number of steps at the start that train the critic alone, where there is a critic."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        """Return the settings of the file over the settings of the preset."""
        if not isinstance(given, dict):
            return given
        name = given.get("type", "grpo")
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            return given  # refused with the list of names by the field itself
        preset = merge({"loss": {"type": "ppo"}, "correction": {"type": "auto"}}, preset)
        correction, loss = given.get("correction"), given.get("loss")
        loss_type = loss.get("type", preset["loss"]["type"]) if isinstance(loss, dict) else preset["loss"]["type"]
        preset["loss"] = _fit_loss(preset["loss"], loss_type)
        advantage = given.get("advantage")
        if isinstance(advantage, dict) and advantage.get("estimator") not in (None, preset["advantage"]["estimator"]):
            preset["advantage"] = {}  # ppo's λ does not apply to another estimator
        if isinstance(correction, dict) and correction.get("type") in ("m2po", "dppo"):
            # m2po and dppo are trust regions of their own: the ratio is not clipped too, unless the file says so.
            preset["loss"] |= dict.fromkeys({"clip_low", "clip_high", "dual_clip"} & preset["loss"].keys())
        return merge(preset, given)

    @model_validator(mode="after")
    def _check(self) -> AlgorithmSection:
        _check_estimator(self.advantage)
        _check_limits(self)
        _check_correction(self)
        return self

    @property
    def needs_critic(self) -> bool:
        """Whether the learner trains a critic."""
        return self.advantage.estimator == "gae"

    @property
    def needs_groups(self) -> bool:
        """Whether the estimator compares the samples of a prompt with each other."""
        return self.advantage.estimator in GROUP_ESTIMATORS

    @property
    def needs_reference(self) -> bool:
        """Whether the mesh needs log-probabilities under the reference policy."""
        return self.kl.coef > 0

    def resolve_correction(self, max_staleness: int) -> ResolvedCorrection:
        """Return the correction of a run with training.max_staleness ``max_staleness``.

        The preset grpo gives ("tis", "old") at 0 and ("none", "behaviour") above.
        """
        section, loss, is_asynchronous = self.correction, self.loss.type, max_staleness > 0
        if isinstance(section, (M2poCorrection, DppoCorrection)):
            return ResolvedCorrection(section.type, "behaviour")
        if not isinstance(section, (AutoCorrection, NoCorrection)):
            return ResolvedCorrection(section.type, "old")
        weighs_tokens = loss == "policy_gradient" or (not is_asynchronous and loss != "gspo")
        if isinstance(section, AutoCorrection) and weighs_tokens and section.ratio != "behaviour":
            return ResolvedCorrection("tis", "old")
        if section.ratio != "auto":
            return ResolvedCorrection("none", section.ratio)
        return ResolvedCorrection("none", "behaviour" if is_asynchronous else "old")

    def needs_old_pass(self, max_staleness: int, updates_per_batch: int) -> bool:
        """Return whether the learner computes log-probabilities before the first optimiser step of a batch.

        The learner needs these log-probabilities in three cases: the reward has a KL term; the correction chooses its
        tokens once for the batch; or several optimiser steps move away from the policy that the ratio is taken against.
        """
        kind, ratio = self.resolve_correction(max_staleness)
        has_kl_in_reward = self.needs_reference and self.kl.place == "reward"
        section = self.correction
        is_approximated = isinstance(section, DecoupledCorrection) and section.proximal == "approximated"
        moves_from_old = updates_per_batch > 1 and ratio == "old" and not is_approximated
        return has_kl_in_reward or kind == "m2po" or moves_from_old


def _fit_loss(preset: dict[str, Any], chosen_type: Any) -> dict[str, Any]:
    """Return the preset's loss settings, fitted to the loss type that the file chose.

    If the chosen type has other settings than the preset's type, only the settings of the average carry over: the clip
    of ppo does not fit cispo.
    """
    chosen = LOSSES.get(chosen_type) if isinstance(chosen_type, str) else None
    if chosen is None:
        return preset  # refused with the list of names by the field itself
    defaults = {name: field.default for name, field in chosen.model_fields.items() if name != "type"}
    if chosen is LOSSES[preset["type"]]:
        return {**defaults, **preset}
    return {**defaults, **{key: preset[key] for key in ("aggregation", "constant_tokens") if key in preset}}


def _check_estimator(section: AdvantageSection) -> None:
    """Refuse settings that have no effect with the estimator, unless they have their default value."""
    for name, estimators in ESTIMATOR_SETTINGS.items():
        value = getattr(section, name)
        if section.estimator not in estimators and value != AdvantageSection.model_fields[name].default:
            raise ConfigError(
                f"algorithm.advantage.{name}",
                f"{value} belongs to {', '.join(estimators)} and not to {section.estimator}",
                "remove it",
            )


def _check_limits(section: AlgorithmSection) -> None:
    ranges = {
        "algorithm.reward.clip": section.reward.clip,
        "algorithm.filter.score_range": section.filter.score_range,
    }
    if isinstance(section.correction, (AutoCorrection, TruncatedCorrection)):
        ranges["algorithm.correction.low"] = (section.correction.low, section.correction.high)
    for place, limits in ranges.items():
        if limits is not None and limits[0] >= limits[1]:
            raise ConfigError(place, f"{limits[0]:g} is not below {limits[1]:g}", "put the lower limit first")
    loss = section.loss
    if isinstance(loss, SurrogateLoss) and loss.clip_low is not None and loss.clip_low >= 1:
        raise ConfigError(
            "algorithm.loss.clip_low", f"{loss.clip_low:g} allows ratios below 0", "use less than 1, or null"
        )
    if section.loss.constant_tokens is not None and section.loss.aggregation != "constant":
        raise ConfigError(
            "algorithm.loss.constant_tokens",
            f"has no effect with aggregation {section.loss.aggregation}",
            "remove it, or set aggregation to constant",
        )


def _check_correction(section: AlgorithmSection) -> None:
    correction = section.correction
    if section.loss.type == "gspo" and correction.type not in ("auto", "none"):
        raise ConfigError(
            "algorithm.correction.type",
            f"{correction.type} weighs single tokens, and GSPO's ratio is the sequence's",
            "use none with ratio: behaviour, which makes GSPO's ratio the correction",
        )
    if section.loss.type != "policy_gradient":
        return
    if correction.type in ("m2po", "dppo", "decoupled"):
        raise ConfigError(
            "algorithm.correction.type",
            f"{correction.type} limits a ratio, and the plain policy gradient has none",
            "use tis, icepop or seq_mask_tis, or another loss",
        )
    if isinstance(correction, (AutoCorrection, NoCorrection)) and correction.ratio == "behaviour":
        raise ConfigError(
            "algorithm.correction.ratio",
            "behaviour corrects nothing here: the plain policy gradient has no ratio",
            "remove it, which weighs tokens by tis, or use another loss",
        )
