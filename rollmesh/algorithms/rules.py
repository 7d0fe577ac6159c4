"""The rules that span the objective and other sections: settings that are refused, and settings with a warning."""

from __future__ import annotations

from rollmesh.algorithms.config import AlgorithmSection
from rollmesh.algorithms.variants import DecoupledCorrection, PolicyGradientLoss
from rollmesh.config.shared import SamplingSection, TrainingSection
from rollmesh.errors import ConfigError


def check_objective(
    algorithm: AlgorithmSection, training: TrainingSection, sampling: SamplingSection, updates_per_batch: int
) -> None:
    """Refuse an objective that cannot work with the run's batches.

    Args:
        algorithm: the objective.
        training: the size of a batch, the number of steps, and the permitted staleness.
        sampling: the sampling of training samples.
        updates_per_batch: optimiser steps on each batch.

    Raises:
        ConfigError: the objective cannot work. One sentence names the first fault.
    """
    _check_groups(algorithm, training)
    buffer, limit = algorithm.reward.overlong_buffer_tokens, sampling.max_new_tokens
    if buffer is not None and buffer > limit:
        raise ConfigError(
            "algorithm.reward.overlong_buffer_tokens",
            f"{buffer} is more than sampling.max_new_tokens {limit}",
            "lower it",
        )
    _check_correction(algorithm, training, updates_per_batch)
    _check_kl(algorithm, training)
    _check_frozen_steps(algorithm, training)


def _check_groups(algorithm: AlgorithmSection, training: TrainingSection) -> None:
    samples = training.samples_per_prompt
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


def _check_correction(algorithm: AlgorithmSection, training: TrainingSection, updates_per_batch: int) -> None:
    section, loss = algorithm.correction, algorithm.loss
    is_clipped = not isinstance(loss, PolicyGradientLoss) and (loss.clip_low, loss.clip_high) != (None, None)
    if section.type == "m2po" and updates_per_batch > 1 and not is_clipped:
        raise ConfigError(
            "algorithm.correction.type",
            f"m2po chooses its tokens once for a batch, and nothing limits the last of {updates_per_batch} optimiser "
            "steps",
            "set algorithm.loss.clip_low and clip_high as well, or use dppo",
        )
    is_approximated = isinstance(section, DecoupledCorrection) and section.proximal == "approximated"
    if is_approximated and training.max_staleness == 0:
        raise ConfigError(
            "algorithm.correction.proximal",
            "approximated goes by a token's age in versions, and with training.max_staleness 0 there is none",
            "use recomputed",
        )


def _check_kl(algorithm: AlgorithmSection, training: TrainingSection) -> None:
    section = algorithm.kl
    if section.target is None:
        return
    if section.coef == 0:
        raise ConfigError("algorithm.kl.target", f"{section.target:g} cannot move a coefficient of 0", "set kl.coef")
    samples = training.prompts_per_step * training.samples_per_prompt
    if samples >= 5 * section.horizon:
        raise ConfigError(
            "algorithm.kl.horizon",
            f"{section.horizon} lets one batch of {samples} samples turn the coefficient negative "
            "(0.2 × samples / horizon must be below 1)",
            f"use more than {samples // 5}",
        )


def _check_frozen_steps(algorithm: AlgorithmSection, training: TrainingSection) -> None:
    frozen = algorithm.policy_frozen_steps
    if frozen >= training.steps:
        raise ConfigError(
            "algorithm.policy_frozen_steps", f"{frozen} leaves nothing of training.steps {training.steps}", "lower it"
        )
    if frozen and not algorithm.needs_critic:
        raise ConfigError(
            "algorithm.policy_frozen_steps",
            f"{frozen} steps would train nothing: {algorithm.advantage.estimator} has no critic",
            "remove it",
        )


def objective_warnings(algorithm: AlgorithmSection, training: TrainingSection, sampling: SamplingSection) -> list[str]:
    """Return warnings about settings that work and that the user probably does not mean, a sentence each."""
    return [
        *_truncation_warnings(algorithm, training, sampling),
        *_kl_warnings(algorithm),
        *_filter_warnings(algorithm),
    ]


def _truncation_warnings(
    algorithm: AlgorithmSection, training: TrainingSection, sampling: SamplingSection
) -> list[str]:
    if sampling.is_whole or algorithm.resolve_correction(training.max_staleness) == ("none", "old"):
        return []
    cut = f"sampling.top_p {sampling.top_p:g}" if sampling.top_p < 1 else f"sampling.top_k {sampling.top_k}"
    return [
        f"{cut} samples from another distribution than the learner computes, so every importance ratio is off; sample "
        "from the whole distribution, or set algorithm.correction to {type: none, ratio: old}"
    ]


def _kl_warnings(algorithm: AlgorithmSection) -> list[str]:
    kl = algorithm.kl
    if kl.coef and kl.place == "loss" and kl.estimator == "k1":
        return ["algorithm.kl: k1 as a loss has no gradient on average; use k2 or k3, or place: reward"]
    if kl.coef and kl.place == "reward" and kl.estimator != "k1":
        return [f"algorithm.kl: {kl.estimator} in the reward is biased; k1 is meant for there"]
    return []


def _filter_warnings(algorithm: AlgorithmSection) -> list[str]:
    reward = algorithm.reward
    is_shaped = reward.overlong_buffer_tokens is not None or reward.stop_properly_coef is not None
    if not algorithm.filter.should_drop_zero_variance or (algorithm.needs_groups and not is_shaped):
        return []
    return [
        "algorithm.filter.should_drop_zero_variance looks at rewards as they are scored; with penalties, or without a "
        "group's baseline, groups of equal rewards do have a gradient"
    ]
