"""The comparison of the engine's and the learner's log-probabilities: a check on the first batch, later a metric.

::

    a sample whose tokens all come from the learner's own version
        ├── log μ    recorded by the engine while it sampled
        └── log π    computed by the learner with the same weights
                |log μ - log π| ──► over the tolerance, the run stops before the first optimiser step

log μ and log π have the same weights, tokens and temperature, so they may differ by rounding only. A larger difference
means that engine or learner leaves out a part of the model, such as a soft cap of the attention, a window, or a bias of
the router. Then every ratio of the objective is wrong from the first step on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from rollmesh.errors import ConfigError
from services.learner.config import LearnerSection
from services.learner.experience import Experience
from services.learner.ranks import Ranks

_logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
"""Tolerance of the largest difference of a token, where learner and engine compute in float32."""
BFLOAT16_TOLERANCE = 0.1
"""Tolerance of the mean difference over tokens, for other dtypes. docs/models.md has the measurements."""
MAX_DIFFERENCE = 1000.0
"""The difference of a token that only learner or engine forbids, or that has a NaN, so that metrics are finite."""
QUANTISING = ("quantization", "kv_cache_dtype")
"""Arguments of vLLM with which the engine computes another model than the learner on purpose."""
EVERY_STEPS = 20
"""Steps from one comparison to the next, after the first."""
SEQUENCES_PER_RANK = 4
"""Sequences that each rank compares, after the first comparison."""

Recompute = Callable[[Sequence[int]], Tensor]
"""Takes indices of sequences. Returns float32 [N], with the learner's log-probabilities at the places of their tokens;
the other places are not read."""


@dataclass(frozen=True, slots=True)
class ParityMeasurement:
    """The differences between the engine's and the learner's log-probabilities, on one rank or on all ranks.

    Attributes:
        num_tokens: number of compared tokens.
        total: sum of the absolute differences.
        largest: the largest absolute difference.
        worst: the token with the largest difference, and its two log-probabilities, in words.
    """

    num_tokens: int
    total: float
    largest: float
    worst: str

    @property
    def mean(self) -> float:
        """Return the mean absolute difference of a token; 0 without tokens."""
        return self.total / self.num_tokens if self.num_tokens else 0.0


class ParityCheck:
    """The comparison of the engine's and the learner's log-probabilities.

    The first comparison is made on the first batch of this process with a sample of the learner's version. Later
    comparisons are `EVERY_STEPS` steps apart.

    Args:
        section: the learner's settings.
        ranks: the process group.
        engine_dtype: the dtype of the rollout workers' engines.
        engine_arguments: further arguments of these engines.
        is_whole_distribution: whether the engine samples from all tokens. If not, nothing is compared.
    """

    def __init__(
        self,
        section: LearnerSection,
        ranks: Ranks,
        *,
        engine_dtype: str,
        engine_arguments: Mapping[str, object],
        is_whole_distribution: bool,
    ) -> None:
        self._mode = section.parity
        if self._mode == "error" and any(engine_arguments.get(name) not in (None, "auto") for name in QUANTISING):
            self._mode = "warn"
        self._ranks = ranks
        dtypes = (section.dtype, engine_dtype)
        self._is_exact = set(dtypes) == {"float32"}
        default = FLOAT32_TOLERANCE if self._is_exact else BFLOAT16_TOLERANCE
        self._tolerance = default if section.parity_tolerance is None else section.parity_tolerance
        self._dtypes = "learner {}, engine {}".format(*dtypes)
        self._is_comparable = is_whole_distribution
        self._next_step: int | None = None

    def __call__(
        self, experience: Experience, learner_number: int, step: int, recompute: Recompute
    ) -> dict[str, float]:
        """Compare log-probabilities if a comparison is due. Collective: all ranks return or raise the same.

        Args:
            experience: this rank's part of the batch.
            learner_number: number of the version whose weights the learner has.
            step: number of the batch, from 1.
            recompute: computes log-probabilities with these weights; called on all ranks or on no rank.

        Returns:
            Metrics by name; empty where nothing was compared.

        Raises:
            ConfigError: the first comparison is over the tolerance, and `learner.parity` is "error".
        """
        is_first = self._next_step is None
        if self._mode == "off" or not self._is_comparable or (self._next_step is not None and step < self._next_step):
            return {}
        chosen = sequences_of(experience, learner_number)
        chosen = chosen if is_first else chosen[:SEQUENCES_PER_RANK]
        (num_chosen,) = self._ranks.sum([len(chosen)])
        if num_chosen == 0:  # in an asynchronous run all samples may be of other versions
            return {}
        local = compare(experience, chosen, recompute(chosen))
        found = merge(self._ranks.gather_bytes(json.dumps(asdict(local)).encode()))
        self._next_step = step + EVERY_STEPS
        if is_first:
            self._judge(found)
        return {"parity/mean": found.mean, "parity/max": found.largest, "parity/tokens": float(found.num_tokens)}

    def _judge(self, found: ParityMeasurement) -> None:
        measured = found.largest if self._is_exact else found.mean
        if measured <= self._tolerance:
            _logger.info(
                "learner and engine agree on %d tokens: the log-probabilities differ by %.2g at most, %.2g on average",
                found.num_tokens,
                found.largest,
                found.mean,
            )
            return
        which = "largest" if self._is_exact else "mean"
        problem = (
            f"learner and engine disagree about the same weights ({self._dtypes}): over {found.num_tokens} tokens the "
            f"log-probabilities differ by {found.mean:.3g} on average and {found.largest:.3g} at most ({found.worst}), "
            f"and the {which} difference may be {self._tolerance:g}"
        )
        fix = (
            "likely causes are an attention implementation that leaves something out (learner.attention), packed "
            "sequences that see each other (learner.packing), an engine argument that changes the model "
            "(rollout.engine), or two dtypes; correct that, raise "
            "learner.parity_tolerance, or set learner.parity to warn"
        )
        if self._mode == "warn":
            _logger.warning("%s; %s", problem, fix)
            return
        raise ConfigError("learner.parity", problem, fix)


def sequences_of(experience: Experience, number: int) -> list[int]:
    """Return the indices of the sequences whose generated tokens all come from the version with this number."""
    ends = [*experience.sequence_starts[1:], len(experience.version_numbers)]
    spans = zip(experience.sequence_starts, ends, strict=False)
    return [
        index
        for index, (start, end) in enumerate(spans)
        if bool((experience.version_numbers[start:end] == number).all())
    ]


def compare(experience: Experience, chosen: Sequence[int], logprobs: Tensor) -> ParityMeasurement:
    """Return the differences between the engine's and the learner's log-probabilities on some sequences.

    A token that both forbid (a log-probability of −∞) has the difference 0. A token that only one of them forbids, or
    that has a NaN, has the difference `MAX_DIFFERENCE`.

    Args:
        experience: this rank's part of the batch.
        chosen: indices of the sequences to compare.
        logprobs: float32 [N], log-probabilities of the learner.
    """
    samples = experience.samples_with_tokens
    starts, num_tokens, total, largest, worst = experience.sequence_starts, 0, 0.0, -1.0, ""
    for index in chosen:
        sample, start = samples[index], starts[index]
        places = slice(start, start + sample.num_generated_tokens)
        engine, learner = experience.behaviour[places].double(), logprobs[places].double()
        apart = torch.where(engine == learner, 0.0, (engine - learner).abs())
        difference = apart.nan_to_num(nan=MAX_DIFFERENCE).clamp(max=MAX_DIFFERENCE).numpy()
        num_tokens += len(difference)
        total += float(difference.sum())
        place = int(np.argmax(difference))
        if difference[place] > largest:
            largest = float(difference[place])
            worst = (
                f"token {place} of sample {sample.sample_id}: engine {engine[place]:.4f}, learner {learner[place]:.4f}"
            )
    return ParityMeasurement(num_tokens, total, max(0.0, largest), worst)


def merge(measurements: Sequence[bytes]) -> ParityMeasurement:
    """Return the measurement over all ranks. ``measurements`` has the measurement of each rank as JSON."""
    of_ranks = [ParityMeasurement(**json.loads(each)) for each in measurements]
    worst = max(of_ranks, key=lambda of_rank: of_rank.largest)
    return ParityMeasurement(
        num_tokens=sum(of_rank.num_tokens for of_rank in of_ranks),
        total=sum(of_rank.total for of_rank in of_ranks),
        largest=worst.largest,
        worst=worst.worst,
    )
