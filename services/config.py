"""The whole mesh file: composes the services' sections and checks what spans several."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from rollmesh.algorithms.config import AlgorithmSection
from rollmesh.config import (
    DataSection,
    EvaluationSection,
    ModelSection,
    ReplaySection,
    RunSection,
    SamplingSection,
    Section,
    TrainingSection,
    WeightsSection,
    load_yaml,
    validate,
)
from rollmesh.errors import ConfigError
from services.coordinator.config import CoordinatorSection
from services.learner.config import LearnerSection
from services.reference.config import ReferenceSection
from services.reward.config import RewardSection
from services.rollout.config import RolloutSection


class MeshConfig(Section):
    """One mesh file."""

    run: RunSection
    model: ModelSection
    data: DataSection
    evaluation: EvaluationSection | None = None
    training: TrainingSection
    sampling: SamplingSection
    algorithm: AlgorithmSection = AlgorithmSection()
    coordinator: CoordinatorSection = CoordinatorSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    reference: ReferenceSection | None = Field(default=None)
    """Needed where algorithm.kl.coef is greater than 0."""
    learner: LearnerSection = LearnerSection()
    replay: ReplaySection = ReplaySection()
    weights: WeightsSection = WeightsSection()

    @property
    def has_reference(self) -> bool:
        return self.algorithm.kl.coef > 0

    @property
    def correction(self) -> tuple[str, str]:
        """The off-policy correction and the policy that the ratio is taken against, with `auto` resolved."""
        section = self.algorithm.correction
        is_asynchronous, loss = self.training.max_staleness > 0, self.algorithm.loss.type
        kind = section.type
        if kind == "auto":
            weighs_tokens = loss == "policy_gradient" or (not is_asynchronous and loss != "gspo")
            kind = "tis" if weighs_tokens and section.ratio != "behaviour" else "none"
        if kind in ("m2po", "dppo"):
            return kind, "behaviour"
        if kind != "none":
            return kind, "old"
        if section.ratio != "auto":
            return kind, section.ratio
        return kind, "behaviour" if is_asynchronous else "old"

    @property
    def needs_old_pass(self) -> bool:
        """Whether the learner computes log-probabilities before the first optimiser step of a batch."""
        kind, ratio = self.correction
        is_charged = self.has_reference and self.algorithm.kl.place == "reward"
        is_approximated = kind == "decoupled" and self.algorithm.correction.proximal == "approximated"
        is_moved_from = self.updates_per_batch > 1 and ratio == "old" and not is_approximated
        return is_charged or kind == "m2po" or is_moved_from

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps on each batch."""
        return self.learner.steps_per_batch * self.learner.epochs_per_batch

    @property
    def warnings(self) -> list[str]:
        """What works and is probably not meant, a sentence each."""
        return [*_sampling_warnings(self), *_objective_warnings(self)]

    @property
    def max_open_groups(self) -> int:
        """Groups that one rollout worker holds at the same time."""
        if self.rollout.max_open_groups is not None:
            return self.rollout.max_open_groups
        return max(1, math.ceil(2 * self.rollout.engine.max_num_seqs / self.training.samples_per_prompt))

    @model_validator(mode="after")
    def _cross_check(self) -> MeshConfig:
        _check_lengths(self)
        _check_attention(self.learner.attention)
        _check_objective(self)
        _check_batches(self)
        _check_reward(self)
        _check_timeouts(self)
        return self


def _check_lengths(config: MeshConfig) -> None:
    new, limit = config.sampling.max_new_tokens, config.model.max_length
    if new >= limit:
        raise ConfigError(
            "sampling.max_new_tokens",
            f"{new} leaves no room for a prompt in model.max_length {limit}",
            "lower the one or raise the other",
        )
    if limit > config.learner.tokens_per_micro_batch:
        raise ConfigError(
            "learner.tokens_per_micro_batch",
            f"{config.learner.tokens_per_micro_batch} cannot hold one sample of model.max_length {limit}",
            "raise it to at least that",
        )
    if config.has_reference and config.reference and limit > config.reference.tokens_per_batch:
        raise ConfigError(
            "reference.tokens_per_batch",
            f"{config.reference.tokens_per_batch} cannot hold one sample of model.max_length {limit}",
            "raise it to at least that",
        )


def _check_attention(name: str) -> None:
    """Implementations have a few names in transformers, and `owner/name` where they come from elsewhere."""
    if "/" not in name and not re.fullmatch(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d+)", name):
        raise ConfigError(
            "learner.attention", f"{name!r} is not known", "use eager, sdpa, flex_attention or flash_attention_2"
        )


def _check_objective(config: MeshConfig) -> None:
    if config.has_reference and config.reference is None:
        raise ConfigError(
            "algorithm.kl.coef",
            f"{config.algorithm.kl.coef:g} needs reference log-probabilities but there is no reference section",
            "add a `reference:` section or set the coefficient to 0",
        )
    algorithm, samples = config.algorithm, config.training.samples_per_prompt
    if samples < 2 and algorithm.needs_groups:
        raise ConfigError(
            "training.samples_per_prompt",
            f"{samples} gives {algorithm.advantage.estimator} no group to compare with",
            "set it to 2 or more, or use the algorithm ppo or reinforce++",
        )
    if samples < 2 and algorithm.filter.is_on:
        raise ConfigError(
            "training.samples_per_prompt",
            f"{samples} leaves algorithm.filter nothing to judge a prompt by",
            "set it to 2 or more, or remove the filter",
        )
    buffer, limit = algorithm.reward.overlong_buffer_tokens, config.sampling.max_new_tokens
    if buffer is not None and buffer > limit:
        raise ConfigError(
            "algorithm.reward.overlong_buffer_tokens",
            f"{buffer} is more than sampling.max_new_tokens {limit}",
            "lower it",
        )
    _check_correction(config)
    _check_kl(config)
    if algorithm.policy_frozen_steps >= config.training.steps:
        raise ConfigError(
            "algorithm.policy_frozen_steps",
            f"{algorithm.policy_frozen_steps} leaves nothing of training.steps {config.training.steps}",
            "lower it",
        )
    if algorithm.policy_frozen_steps and not algorithm.needs_critic:
        raise ConfigError(
            "algorithm.policy_frozen_steps",
            f"{algorithm.policy_frozen_steps} steps would train nothing: {algorithm.advantage.estimator} has no critic",
            "remove it",
        )


def _check_correction(config: MeshConfig) -> None:
    section, loss = config.algorithm.correction, config.algorithm.loss
    if section.type == "m2po" and config.updates_per_batch > 1 and loss.clip_low is None and loss.clip_high is None:
        raise ConfigError(
            "algorithm.correction.type",
            f"m2po chooses its tokens once for a batch, and nothing limits the last of "
            f"{config.updates_per_batch} optimiser steps",
            "set algorithm.loss.clip_low and clip_high as well, or use dppo",
        )
    if section.type == "decoupled" and section.proximal == "approximated" and config.training.max_staleness == 0:
        raise ConfigError(
            "algorithm.correction.proximal",
            "approximated goes by a token's age in versions, and with training.max_staleness 0 there is none",
            "use recomputed",
        )


def _check_kl(config: MeshConfig) -> None:
    section = config.algorithm.kl
    if section.target is None:
        return
    if section.coef == 0:
        raise ConfigError("algorithm.kl.target", f"{section.target:g} cannot move a coefficient of 0", "set kl.coef")
    samples = config.training.prompts_per_step * config.training.samples_per_prompt
    if samples >= 5 * section.horizon:
        raise ConfigError(
            "algorithm.kl.horizon",
            f"{section.horizon} lets one batch of {samples} samples turn the coefficient negative "
            "(0.2 × samples / horizon must be below 1)",
            f"use more than {samples // 5}",
        )


def _check_batches(config: MeshConfig) -> None:
    batch, ranks = config.training.prompts_per_step, config.learner.num_ranks
    if batch % ranks:
        raise ConfigError(
            "training.prompts_per_step",
            f"{batch} is not divisible by learner.num_ranks {ranks}",
            f"use a multiple of {ranks}",
        )
    parts = config.learner.steps_per_batch
    if parts > batch:
        raise ConfigError(
            "learner.steps_per_batch",
            f"{parts} optimiser steps need more groups than training.prompts_per_step {batch}",
            f"use at most {batch}",
        )
    slots, most = config.training.num_slots, (config.training.max_staleness + 1) * batch
    if slots < batch:
        raise ConfigError(
            "training.slots",
            f"{slots} open groups can never fill a batch of training.prompts_per_step = {batch} (deadlock)",
            f"use {batch} to {most}",
        )
    if slots > most:
        raise ConfigError(
            "training.slots",
            f"{slots} breaks the staleness bound: slots ≤ (max_staleness + 1) × prompts_per_step = {most}",
            f"use {batch} to {most} or raise training.max_staleness",
        )


def _check_reward(config: MeshConfig) -> None:
    if config.reward.function is None and config.reward.address.endswith(":0"):
        raise ConfigError(
            "reward",
            "has neither a `function` file nor the `address` of a running server",
            "set one of them",
        )
    if config.reward.function is not None and config.reward.timeout_s >= config.rollout.scoring_timeout_s:
        raise ConfigError(
            "rollout.scoring_timeout_s",
            f"{config.rollout.scoring_timeout_s:g} s are over before one call of {config.reward.timeout_s:g} s "
            "(reward.timeout_s) is, and nobody would hear why",
            "raise the one or lower the other",
        )


def _check_timeouts(config: MeshConfig) -> None:
    interval, timeout = config.coordinator.heartbeat_interval_s, config.coordinator.member_timeout_s
    if timeout <= 2 * interval:
        raise ConfigError(
            "coordinator.member_timeout_s",
            f"{timeout:g} is not more than two heartbeats of {interval:g} s",
            "raise it",
        )


def _sampling_warnings(config: MeshConfig) -> list[str]:
    sampling = config.sampling
    is_whole = sampling.top_p == 1 and sampling.top_k == 0
    if is_whole or config.correction == ("none", "old"):
        return []
    cut = f"sampling.top_p {sampling.top_p:g}" if sampling.top_p < 1 else f"sampling.top_k {sampling.top_k}"
    return [
        f"{cut} samples from another distribution than the learner computes, so every importance ratio is off; sample "
        "from the whole distribution, or set algorithm.correction to {type: none, ratio: old}"
    ]


def _objective_warnings(config: MeshConfig) -> list[str]:
    algorithm, kl = config.algorithm, config.algorithm.kl
    warnings = []
    if kl.coef and kl.place == "loss" and kl.estimator == "k1":
        warnings.append("algorithm.kl: k1 as a loss has no gradient on average; use k2 or k3, or place: reward")
    if kl.coef and kl.place == "reward" and kl.estimator != "k1":
        warnings.append(f"algorithm.kl: {kl.estimator} in the reward is biased; k1 is meant for there")
    reward = algorithm.reward
    is_shaped = reward.overlong_buffer_tokens is not None or reward.stop_properly_coef is not None
    if algorithm.filter.should_drop_zero_variance and (is_shaped or not algorithm.needs_groups):
        warnings.append(
            "algorithm.filter.should_drop_zero_variance looks at rewards as they are scored; with penalties, or "
            "without a group's baseline, groups of equal rewards do have a gradient"
        )
    return warnings


def load_mesh(path: Path, overrides: Sequence[str] = ()) -> MeshConfig:
    """Read, override and validate a mesh file.

    Raises:
        ConfigError: one sentence with the place, the value and the fix.
    """
    return validate(MeshConfig, load_yaml(path, overrides))


def dump_mesh(config: MeshConfig) -> str:
    """The resolved configuration as YAML that `load_mesh` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
