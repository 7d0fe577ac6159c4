"""The experience: token sequences, and columns with one value a token, from the groups of a batch.

::

    groups of each optimiser step ─► samples that were not aborted ─┬─► trajectories, for the advantages
                                                                    ├─► a TokenSequence for each sample with tokens
                                                                    └─► columns [N] over this rank's generated tokens
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollmesh.algorithms.pipeline import Trajectories
from rollmesh.algorithms.segments import Segments
from rollmesh.errors import ReplayError
from rollmesh.types import Group, Int32Array, Sample, StopReason


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of one sample, prompt and response together.

    Attributes:
        token_ids: int32 [T], prompt and response.
        positions: int32 [G], places of the G generated tokens in ``token_ids``; greater than 0.
    """

    token_ids: Int32Array
    positions: Int32Array


@dataclass(frozen=True, slots=True)
class StepShare:
    """The samples of one optimiser step on one rank. They follow each other in the rank's share of the batch.

    Attributes:
        groups: the samples of each group of the step.
        tokens: the generated tokens of each sample of the step; a sample may have none.
        sequences: range of the step's sequences in `Experience.sequences`.
        columns: range of the step's tokens in the columns of the batch.
    """

    groups: Segments
    tokens: Segments
    sequences: slice
    columns: slice


@dataclass(frozen=True, slots=True)
class Experience:
    """One rank's share of a batch, ready to be trained on: S samples of G groups with N generated tokens.

    Attributes:
        trajectories: the samples as tensors, for the advantages. KL and values are None; `Trainer` adds them later.
        sequences: the samples with at least one generated token, in order.
        samples_by_group: the samples of each group, without the aborted samples.
        datasources: the name of each group's data source; empty where the data names none.
        step_shares: the samples of each optimiser step, in order.
        behaviour: float32 [N], log-probabilities with which the engine sampled.
        reference: float32 [N], log-probabilities of the reference model; None where the run has no reference.
        version_numbers: int64 [N], number of the policy version that generated each token.
    """

    trajectories: Trajectories
    sequences: tuple[TokenSequence, ...]
    samples_by_group: tuple[tuple[Sample, ...], ...]
    datasources: tuple[str, ...]
    step_shares: tuple[StepShare, ...]
    behaviour: Tensor
    reference: Tensor | None
    version_numbers: Tensor

    @property
    def samples(self) -> list[Sample]:
        """Return the S samples, group after group."""
        return [sample for group in self.samples_by_group for sample in group]

    @property
    def samples_with_tokens(self) -> list[Sample]:
        """Return the sample of each sequence in `sequences`."""
        return [sample for sample in self.samples if sample.num_generated_tokens]

    @property
    def num_tokens(self) -> int:
        """Return N, the number of generated tokens."""
        return self.trajectories.tokens.size

    @property
    def sequence_starts(self) -> list[int]:
        """Return the place of each sequence's first generated token in the columns.

        Sequences of 3, 2 and 4 generated tokens give 0, 3 and 5.
        """
        lengths = [len(sequence.positions) for sequence in self.sequences]
        return [0, *itertools.accumulate(lengths)][:-1]


def build_experience(groups_by_step: Sequence[Sequence[Group]], needs_reference: bool) -> Experience:
    """Drop the aborted samples and join the arrays of the others.

    Args:
        groups_by_step: this rank's groups of each optimiser step; a step may have none.
        needs_reference: whether the objective uses the log-probabilities of the reference.

    Raises:
        ReplayError: a sample has no score, an empty prompt, an array of the wrong length, or no reference
            log-probabilities although the objective needs them. The error names the sample.
    """
    by_step = [[_not_aborted(group) for group in groups] for groups in groups_by_step]
    samples_by_group = tuple(samples for groups in by_step for samples in groups)
    samples = [sample for group in samples_by_group for sample in group]
    for sample in samples:
        _check(sample, needs_reference)
    with_tokens = [sample for sample in samples if sample.num_generated_tokens]
    offsets = [np.flatnonzero(sample.action_mask) for sample in with_tokens]
    sequences = tuple(
        TokenSequence(
            token_ids=np.concatenate([sample.prompt_token_ids, sample.response_token_ids]),
            positions=(places + len(sample.prompt_token_ids)).astype(np.int32),
        )
        for sample, places in zip(with_tokens, offsets, strict=True)
    )
    reference = None
    if needs_reference:
        of_generated = [_reference(s)[places] for s, places in zip(with_tokens, offsets, strict=True)]
        reference = _joined(of_generated, np.float32)
    return Experience(
        trajectories=_trajectories(samples_by_group, samples, _joined(offsets, np.int64)),
        sequences=sequences,
        samples_by_group=samples_by_group,
        datasources=tuple(group.datasource for groups in groups_by_step for group in groups),
        step_shares=_step_shares(by_step),
        behaviour=_joined([sample.behaviour_logprobs for sample in with_tokens], np.float32),
        reference=reference,
        version_numbers=_joined([_version_numbers(sample) for sample in with_tokens], np.int64),
    )


def _not_aborted(group: Group) -> tuple[Sample, ...]:
    return tuple(sample for sample in group.samples if sample.stop_reason is not StopReason.ABORTED)


def _trajectories(
    samples_by_group: Sequence[Sequence[Sample]], samples: Sequence[Sample], offsets: Tensor
) -> Trajectories:
    """Return the samples without KL and values. The oldest version of a sample without generated tokens is 0."""
    oldest = [s.oldest_version.number if s.version_spans else 0 for s in samples]
    return Trajectories(
        rewards=torch.tensor([s.score.reward for s in samples if s.score], dtype=torch.float64),
        groups=_segments([len(group) for group in samples_by_group]),
        tokens=_segments([sample.num_generated_tokens for sample in samples]),
        offsets=offsets,
        versions=torch.tensor(oldest, dtype=torch.int64),
        is_truncated=torch.tensor([s.stop_reason is StopReason.LENGTH for s in samples], dtype=torch.bool),
    )


def _step_shares(by_step: Sequence[Sequence[tuple[Sample, ...]]]) -> tuple[StepShare, ...]:
    shares, sequence, token = [], 0, 0
    for groups in by_step:
        lengths = [sample.num_generated_tokens for group in groups for sample in group]
        num_sequences, num_tokens = sum(length > 0 for length in lengths), sum(lengths)
        shares.append(
            StepShare(
                groups=_segments([len(group) for group in groups]),
                tokens=_segments(lengths),
                sequences=slice(sequence, sequence + num_sequences),
                columns=slice(token, token + num_tokens),
            )
        )
        sequence, token = sequence + num_sequences, token + num_tokens
    return tuple(shares)


def _segments(lengths: Sequence[int]) -> Segments:
    return Segments(torch.tensor(lengths, dtype=torch.int64))


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype))


def _version_numbers(sample: Sample) -> np.ndarray:
    """Return the number of the version that generated each token, int64 [G]."""
    spans = sample.version_spans
    return np.repeat([span.version.number for span in spans], [span.length for span in spans])


def _reference(sample: Sample) -> np.ndarray:
    assert sample.reference_logprobs is not None  # `_check` has refused the sample otherwise
    return sample.reference_logprobs


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
    num_stamped = sum(span.length for span in sample.version_spans)
    if num_stamped != sample.num_generated_tokens:
        raise ReplayError(
            f"sample {sample.sample_id} has version spans of {num_stamped} tokens for {sample.num_generated_tokens} "
            "generated tokens"
        )
    if not needs_reference:
        return
    if sample.reference_logprobs is None or len(sample.reference_logprobs) != len(sample.response_token_ids):
        raise ReplayError(
            f"sample {sample.sample_id} needs one reference log-probability for each of its "
            f"{len(sample.response_token_ids)} response tokens because algorithm.kl.coef is greater than 0"
        )
