"""The metrics of a step: summed on each rank, added over the ranks, named once.

Means are taken from sums and counts, so they are means over the whole batch and not means of ranks' means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollmesh.types import PolicyVersion, Sample, StopReason
from services.learner.experience import Experience
from services.learner.objective import TOKEN_SUMS
from services.learner.ranks import Ranks

_SAMPLE_SUMS = ("samples", "reward", "score", "length", "truncated", "staleness", "tokens", "groups", "group_std")


@dataclass(frozen=True)
class StepStatistics:
    """What a step says about itself, the same on all ranks.

    Attributes:
        loss: the objective's value, before the step.
        metrics: by name, finite; see `reduce_statistics`.
        staleness_histogram: number of samples by staleness.
    """

    loss: float
    metrics: Mapping[str, float]
    staleness_histogram: Mapping[int, int]


def staleness(sample: Sample, learner_number: int) -> int:
    """Versions between the oldest token of a sample and the learner at the start of the step."""
    return learner_number - sample.oldest_version.number


def reduce_statistics(
    experience: Experience, token_sums: Tensor, max_weight: Tensor, learner_number: int, ranks: Ranks
) -> StepStatistics:
    """Add up the ranks' statistics. Collective: two reductions.

    Args:
        experience: this rank's part of the batch.
        token_sums: float64 [len(TOKEN_SUMS)], this rank's.
        max_weight: float64 scalar, this rank's largest importance weight.
        learner_number: number of the version that the step started from.
        ranks: the process group.
    """
    samples = [sample for group in experience.groups for sample in group]
    ages = np.array([staleness(s, learner_number) for s in samples if s.version_spans], dtype=np.int64)
    maxima = torch.tensor([0.0, float(ages.max(initial=0))], dtype=torch.float64, device=ranks.device)
    maxima[0] = max_weight
    largest_weight, oldest = ranks.max_tensor(maxima).tolist()
    histogram = np.bincount(np.maximum(ages, 0), minlength=int(oldest) + 1)
    local = torch.tensor([*_sample_sums(experience, ages), *histogram], dtype=torch.float64).to(ranks.device)
    totals = ranks.sum_tensor(torch.cat([token_sums, local])).tolist()
    tokens = dict(zip(TOKEN_SUMS, totals, strict=False))
    counts = dict(zip(_SAMPLE_SUMS, totals[len(TOKEN_SUMS) :], strict=False))
    by_age = totals[len(TOKEN_SUMS) + len(_SAMPLE_SUMS) :]
    num_tokens, num_samples = max(1.0, counts["length"]), max(1.0, counts["samples"])
    metrics = {
        "reward/mean": counts["reward"] / num_samples,
        "reward/std_in_group": counts["group_std"] / max(1.0, counts["groups"]),
        "score/mean": counts["score"] / num_samples,
        "response/length_mean": counts["length"] / num_samples,
        "response/truncation_rate": counts["truncated"] / num_samples,
        "policy/loss": tokens["policy_loss"] / num_tokens,
        "policy/clip_fraction_low": tokens["clipped_low"] / num_tokens,
        "policy/clip_fraction_high": tokens["clipped_high"] / num_tokens,
        "policy/kl_behaviour": tokens["kl_behaviour"] / num_tokens,
        "policy/entropy": tokens["entropy"] / num_tokens,
        "kl/reference": tokens["kl_reference"] / num_tokens,
        "importance/mean": tokens["weight"] / num_tokens,
        "importance/max": largest_weight,
        "staleness/mean": counts["staleness"] / num_samples,
        "staleness/max": oldest,
        "tokens/generated": counts["length"],
        "tokens/trained": counts["tokens"],
    }
    return StepStatistics(
        loss=tokens["loss"] / num_tokens,
        metrics=metrics,
        staleness_histogram={age: int(number) for age, number in enumerate(by_age)},
    )


def _sample_sums(experience: Experience, ages: np.ndarray[Any, np.dtype[np.int64]]) -> list[float]:
    """The values of `_SAMPLE_SUMS`."""
    samples = [sample for group in experience.groups for sample in group]
    rewards = [[s.score.reward for s in group if s.score] for group in experience.groups]
    return [
        len(samples),
        sum(map(sum, rewards)),
        sum(s.score.score for s in samples if s.score),
        sum(s.num_generated_tokens for s in samples),
        sum(s.stop_reason is StopReason.LENGTH for s in samples),
        int(ages.sum()),
        sum(s.num_tokens for s in samples),
        len(rewards),
        sum(float(np.std(group, ddof=1)) for group in rewards if len(group) > 1),
    ]


class MetricsFile:
    """``metrics.jsonl`` in the run folder: one object per step, flushed as it is written.

    Args:
        path: appended to.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def append(
        self, step: int, version: PolicyVersion, staleness_histogram: Mapping[int, int], metrics: Mapping[str, float]
    ) -> None:
        """Write one line."""
        histogram = {str(age): number for age, number in staleness_histogram.items()}
        line = {"step": step, "version": str(version), **metrics, "staleness_histogram": histogram}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
