"""Whether learner and engine compute the same policy: the guard of the first batch, and a metric later.

::

    sample, all of whose tokens come from the learner's own version
        ├── log μ    recorded by the engine as it sampled
        └── log π    recomputed by the learner with the same weights
                |log μ - log π| ──► within the tolerance, or the run stops before it trains on something else

Both are the same number computed twice: with the same weights, for the same tokens, at the same temperature. Where they
differ by more than rounding, one of the two leaves something out (an attention's soft cap, a window, a bias of the
router), and every ratio of the objective is wrong from the first step on.
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
"""Of the largest difference of one token."""
BFLOAT16_TOLERANCE = 0.1
"""Of the mean difference over tokens; see docs/models.md for what was measured."""
MAX_DIFFERENCE = 1000.0
"""What a token counts that one of the two forbids, or has no number for: metrics are finite."""
QUANTISING = ("quantization", "kv_cache_dtype")
"""Arguments of vLLM with which the engine computes another model than the learner by intention."""
EVERY_STEPS = 20
"""Steps between two measurements after the first."""
SEQUENCES_PER_RANK = 4
"""Of a later measurement."""

Recompute = Callable[[Sequence[int]], Tensor]
"""From indices of sequences to the learner's log-probabilities, float32 [N], 0 for the tokens of other sequences."""


@dataclass(frozen=True, slots=True)
class ParityMeasurement:
    """What the samples of one rank, or of all, differ by.

    Attributes:
        num_tokens: compared.
        total: sum of the absolute differences.
        largest: the largest of them.
        worst: which token that is, in words.
    """

    num_tokens: int
    total: float
    largest: float
    worst: str

    @property
    def mean(self) -> float:
        """Mean absolute difference of a token."""
        return self.total / self.num_tokens if self.num_tokens else 0.0


class ParityCheck:
    """Compares on the first batch of a process that has samples of the learner's version, then every `EVERY_STEPS`.

    Args:
        section: the learner's settings.
        ranks: the process group.
        engine_dtype: dtype of the rollout's engine.
        engine_arguments: further arguments of that engine.
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
        """Compare where it is due. Collective: all ranks come to the same end.

        Args:
            experience: this rank's part of the batch.
            learner_number: number of the version whose weights the learner holds.
            step: number of the batch, from 1.
            recompute: gives the log-probabilities under these weights; called on all ranks or on none.

        Returns:
            Metrics; none where nothing was compared.

        Raises:
            ConfigError: the first comparison is over the tolerance and `learner.parity` is error.
        """
        is_first = self._next_step is None
        if self._mode == "off" or not self._is_comparable or (self._next_step is not None and step < self._next_step):
            return {}
        chosen = sequences_of(experience, learner_number)
        chosen = chosen if is_first else chosen[:SEQUENCES_PER_RANK]
        (num_chosen,) = self._ranks.sum([len(chosen)])
        if num_chosen == 0:  # all samples are of other versions, as they may be in an asynchronous run
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
    """Indices of the sequences all of whose generated tokens come from the version of this number."""
    ends = [*experience.sequence_starts[1:], len(experience.version_numbers)]
    spans = zip(experience.sequence_starts, ends, strict=False)
    return [
        index
        for index, (start, end) in enumerate(spans)
        if bool((experience.version_numbers[start:end] == number).all())
    ]


def compare(experience: Experience, chosen: Sequence[int], logprobs: Tensor) -> ParityMeasurement:
    """What engine and learner differ by on some sequences. A token that both forbid differs by 0, one that only one of
    them forbids, or that one of them has no number for, by `MAX_DIFFERENCE`.

    Args:
        experience: this rank's part of the batch.
        chosen: indices of sequences.
        logprobs: float32 [N], the learner's.
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
    """The comparison over all ranks."""
    of_ranks = [ParityMeasurement(**json.loads(each)) for each in measurements]
    worst = max(of_ranks, key=lambda of_rank: of_rank.largest)
    return ParityMeasurement(
        num_tokens=sum(of_rank.num_tokens for of_rank in of_ranks),
        total=sum(of_rank.total for of_rank in of_ranks),
        largest=worst.largest,
        worst=worst.worst,
    )
