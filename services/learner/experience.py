"""From groups as they come out of the queue to the sequences that are trained on.

::

    Group ──► samples that may be trained ──► rewards ──► advantages ──► Sequence, one per sample with generated tokens
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from rollmesh.algorithms.registry import Algorithm
from rollmesh.errors import ReplayError
from rollmesh.types import Float32Array, Group, Int32Array, Sample, StopReason


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sample as the learner sees it.

    Attributes:
        token_ids: int32 [T], prompt and response.
        positions: int32 [G], where the generated tokens stand in ``token_ids``; greater than 0.
        behaviour_logprobs: float32 [G].
        reference_logprobs: float32 [G], or None where there is no reference.
        advantage: the same for every generated token.
    """

    token_ids: Int32Array
    positions: Int32Array
    behaviour_logprobs: Float32Array
    reference_logprobs: Float32Array | None
    advantage: float


@dataclass(frozen=True, slots=True)
class Experience:
    """One rank's part of a batch, ready to be packed.

    Attributes:
        sequences: those with at least one generated token.
        groups: the samples that count towards the metrics, group after group.
    """

    sequences: tuple[Sequence, ...]
    groups: tuple[tuple[Sample, ...], ...]

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(sequence.positions) for sequence in self.sequences)


def build_experience(groups: SequenceOf[Group], algorithm: Algorithm, needs_reference: bool) -> Experience:
    """Drop aborted samples, compute the advantages within each group, line up the arrays.

    Raises:
        ReplayError: a sample has no score, no prompt, an array of the wrong length, or no reference log-probabilities
            where they are needed.
    """
    kept = tuple(tuple(s for s in group.samples if s.stop_reason is not StopReason.ABORTED) for group in groups)
    samples = [sample for group in kept for sample in group]
    for sample in samples:
        _check(sample, needs_reference)
    rewards = torch.tensor([sample.score.reward for sample in samples if sample.score], dtype=torch.float64)
    advantages = algorithm.advantages(rewards, [len(group) for group in kept]).tolist()
    sequences = tuple(
        _sequence(sample, advantage, needs_reference)
        for sample, advantage in zip(samples, advantages, strict=True)
        if sample.num_generated_tokens
    )
    return Experience(sequences=sequences, groups=kept)


def _check(sample: Sample, needs_reference: bool) -> None:
    if sample.score is None:
        raise ReplayError(f"sample {sample.sample_id} has no score; groups are committed with all samples scored")
    if len(sample.prompt_token_ids) == 0:
        raise ReplayError(f"sample {sample.sample_id} has an empty prompt; its first token has nothing to depend on")
    if len(sample.behaviour_logprobs) != sample.num_generated_tokens:
        raise ReplayError(
            f"sample {sample.sample_id} has {len(sample.behaviour_logprobs)} behaviour log-probabilities "
            f"for {sample.num_generated_tokens} generated tokens"
        )
    if not needs_reference:
        return
    if sample.reference_logprobs is None or len(sample.reference_logprobs) != len(sample.response_token_ids):
        raise ReplayError(
            f"sample {sample.sample_id} needs one reference log-probability for each of its "
            f"{len(sample.response_token_ids)} response tokens because algorithm.kl.coef is greater than 0"
        )


def _sequence(sample: Sample, advantage: float, needs_reference: bool) -> Sequence:
    actions = np.flatnonzero(sample.action_mask)
    reference = (
        sample.reference_logprobs[actions] if needs_reference and sample.reference_logprobs is not None else None
    )
    return Sequence(
        token_ids=np.concatenate([sample.prompt_token_ids, sample.response_token_ids]),
        positions=(actions + len(sample.prompt_token_ids)).astype(np.int32),
        behaviour_logprobs=sample.behaviour_logprobs,
        reference_logprobs=reference,
        advantage=advantage,
    )
