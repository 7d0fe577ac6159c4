"""The metrics of a step, and the file `metrics.jsonl`.

Each rank computes sums and counts. These are added up over the ranks, and a mean is a total sum divided by a total
count. So every mean is a mean over the whole batch, and not a mean of the means of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollmesh.algorithms.pipeline import Advantages
from rollmesh.algorithms.statistics import NUM_RESIDUAL_SUMS, WeightStatistics, explained_variance
from rollmesh.telemetry.details import Details
from rollmesh.telemetry.json_lines import JsonLines
from rollmesh.types import PolicyVersion, Sample, StopReason
from services.learner.experience import Experience
from services.learner.objective import NUM_SUMS, TOKEN_SUMS
from services.learner.ranks import Ranks

NUM_CRITIC_SUMS = 2 + NUM_RESIDUAL_SUMS
"""Number of the critic's sums: the loss, the values, and the sums of the explained variance."""
_SAMPLE_SUMS = (
    "samples",
    "reward",
    "shaped_reward",
    "score",
    "length",
    "truncated",
    "staleness",
    "tokens",
    "groups",
    "group_std",
    "groups_without_variance",
    "mixed_groups",
    "advantage",
    "advantage_squares",
)


@dataclass(frozen=True)
class StepStatistics:
    """The figures of a step, the same on all ranks.

    Attributes:
        loss: the loss before the optimiser step; the mean over the optimiser steps where a batch has several.
        num_samples: samples of the batch, over all ranks.
        metrics: finite values by name; docs/algorithms.md lists the names.
        staleness_histogram: number of samples by staleness.
    """

    loss: float
    num_samples: float
    metrics: Mapping[str, float]
    staleness_histogram: Mapping[int, int]


class StepSums:
    """The sums of a batch on one rank, over all optimiser steps on the batch.

    Args:
        device: the device on which the engines compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.policy = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        self.critic = torch.zeros(NUM_CRITIC_SUMS, dtype=torch.float64, device=device)
        self.policy_norms: list[float] = []
        self.critic_norms: list[float] = []
        self.largest_ratio = 0.0
        """The largest ratio π_θ / μ, over the tokens of all optimiser steps of the policy."""

    def add_policy(self, result: tuple[Tensor, float]) -> None:
        """Add the sums and the gradient norm of one optimiser step of the policy."""
        self.policy += result[0]
        self.policy_norms.append(result[1])

    def add_critic(self, result: tuple[Tensor, float]) -> None:
        """Add the sums and the gradient norm of one optimiser step of the critic."""
        self.critic += result[0]
        self.critic_norms.append(result[1])


def staleness(sample: Sample, learner_number: int) -> int:
    """Return the learner's version at the start of the step, minus the version of the sample's oldest token."""
    return learner_number - sample.oldest_version.number


def reduce_statistics(
    experience: Experience, result: Advantages, sums: StepSums, learner_number: int, ranks: Ranks
) -> StepStatistics:
    """Return the statistics over all ranks. Collective: a maximum, a sum, and a gathering of names from the data.

    Args:
        experience: this rank's part of the batch.
        result: the advantages and shaped rewards of ``experience``.
        sums: this rank's sums over the optimiser steps.
        learner_number: number of the version that the step started from.
        ranks: the process group.
    """
    ages = np.array([staleness(s, learner_number) for s in experience.samples if s.version_spans], dtype=np.int64)
    oldest, largest_ratio = ranks.max([float(ages.max(initial=0)), sums.largest_ratio])
    histogram = np.bincount(np.maximum(ages, 0), minlength=int(oldest) + 1)
    local = torch.tensor([*_sample_sums(experience, result, ages), *histogram], dtype=torch.float64)
    totals = ranks.sum_tensor(torch.cat([sums.policy, sums.critic, local.to(ranks.device)])).cpu()
    policy, critic, local = torch.split(totals, [NUM_SUMS, NUM_CRITIC_SUMS, len(local)])
    counts = dict(zip(_SAMPLE_SUMS, local.tolist(), strict=False))
    tokens = dict(zip(TOKEN_SUMS, policy.tolist(), strict=False))
    metrics = {
        **_sample_metrics(counts),
        **_policy_metrics(tokens, policy[len(TOKEN_SUMS) :], largest_ratio, sums.policy_norms),
        **_critic_metrics(critic, sums.critic_norms),
        "staleness/max": oldest,
        **Details.merged(ranks.gather_bytes(_details(experience).to_json())).metrics(),
    }
    return StepStatistics(
        loss=tokens["loss"] / max(1, len(sums.policy_norms)),
        num_samples=counts["samples"],
        metrics=metrics,
        staleness_histogram={age: int(number) for age, number in enumerate(local[len(_SAMPLE_SUMS) :].tolist())},
    )


def _details(experience: Experience) -> Details:
    details = Details()
    for samples, datasource in zip(experience.samples_by_group, experience.datasources, strict=True):
        for sample in samples:
            if sample.score is not None:
                score = sample.score
                details.add_sample(datasource, score.reward, score.score, score.extra_logs)
    return details


def _sample_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    num_samples, num_groups = max(1.0, counts["samples"]), max(1.0, counts["groups"])
    num_tokens = max(1.0, counts["length"])
    mean = counts["advantage"] / num_tokens
    return {
        "reward/mean": counts["reward"] / num_samples,
        "reward/shaped_mean": counts["shaped_reward"] / num_samples,
        "reward/std_in_group": counts["group_std"] / num_groups,
        "reward/groups_without_variance": counts["groups_without_variance"] / num_groups,
        "score/mean": counts["score"] / num_samples,
        "advantage/mean": mean,
        "advantage/std": max(0.0, counts["advantage_squares"] / num_tokens - mean * mean) ** 0.5,
        "response/length_mean": counts["length"] / num_samples,
        "response/truncation_rate": counts["truncated"] / num_samples,
        "staleness/mean": counts["staleness"] / num_samples,
        "staleness/mixed_groups": counts["mixed_groups"] / num_groups,
        "tokens/generated": counts["length"],
        "tokens/trained": counts["tokens"],
    }


def _policy_metrics(
    tokens: Mapping[str, float], weights: Tensor, largest_ratio: float, norms: Sequence[float]
) -> dict[str, float]:
    """Return means over the tokens of all optimiser steps on the batch; no metrics while the policy is frozen."""
    if not norms:
        return {}
    num_tokens = max(1.0, tokens["tokens"])
    distribution = WeightStatistics.from_sums(weights)
    return {
        "policy/loss": tokens["policy_loss"] / num_tokens,
        "policy/clip_fraction_low": tokens["clipped_low"] / num_tokens,
        "policy/clip_fraction_high": tokens["clipped_high"] / num_tokens,
        "policy/kl_old": tokens["kl_old"] / num_tokens,
        "policy/kl_behaviour": tokens["kl_behaviour"] / num_tokens,
        "policy/entropy": tokens["entropy"] / num_tokens,
        "policy/aux_loss": tokens["aux_loss"] / len(norms),
        "kl/reference": tokens["kl_reference"] / num_tokens,
        "importance/mean": distribution.mean,
        "importance/effective_share": distribution.effective_share,
        "importance/p01": distribution.quantiles[0.01],
        "importance/p50": distribution.quantiles[0.5],
        "importance/p99": distribution.quantiles[0.99],
        "importance/max": largest_ratio,
        "importance/dropped": tokens["dropped"] / num_tokens,
        "importance/forbidden": tokens["forbidden"] / num_tokens,
        "optimizer/grad_norm": sum(norms) / len(norms),
    }


def _critic_metrics(sums: Tensor, norms: Sequence[float]) -> dict[str, float]:
    if not norms:
        return {}
    loss, total = sums[:2].tolist()
    return {
        "value/loss": loss / len(norms),
        "value/mean": total / max(1.0, float(sums[2])),
        "value/explained_variance": explained_variance(sums[2:]),
        "value/grad_norm": sum(norms) / len(norms),
    }


def _sample_sums(experience: Experience, result: Advantages, ages: np.ndarray[Any, np.dtype[np.int64]]) -> list[float]:
    """Return the sums of this rank, in the order of `_SAMPLE_SUMS`."""
    samples = experience.samples
    rewards = [[s.score.reward for s in group if s.score] for group in experience.samples_by_group]
    versions = [{span.version for s in group for span in s.version_spans} for group in experience.samples_by_group]
    return [
        len(samples),
        sum(map(sum, rewards)),
        float(result.rewards.sum()),
        sum(s.score.score for s in samples if s.score),
        sum(s.num_generated_tokens for s in samples),
        sum(s.stop_reason is StopReason.LENGTH for s in samples),
        int(ages.sum()),
        sum(s.num_tokens for s in samples),
        len(rewards),
        sum(float(np.std(group, ddof=1)) for group in rewards if len(group) > 1),
        sum(len(set(group)) < 2 for group in rewards),
        sum(len(group) > 1 for group in versions),
        float(result.advantages.double().sum()),
        float(result.advantages.double().square().sum()),
    ]


class MetricsFile:
    """The file `metrics.jsonl` in the run folder: one JSON object a step, flushed at once.

    Args:
        path: the file; new lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)

    def cut(self, after_step: int) -> None:
        """Drop the lines of steps after ``after_step``, because these steps are trained again."""
        self._file.keep(lambda line: line["step"] <= after_step)

    def append(
        self, step: int, version: PolicyVersion, staleness_histogram: Mapping[int, int], metrics: Mapping[str, float]
    ) -> None:
        """Write the line of one step."""
        histogram = {str(age): number for age, number in staleness_histogram.items()}
        self._file.append({"step": step, "version": str(version), **metrics, "staleness_histogram": histogram})
