"""From groups as they come out of the queue to the sequences and per-token columns that are trained on.

::

    optimiser steps ─► groups ─► samples that may be trained ─► TokenSequence, one per sample with generated tokens
                                                               └─► columns [N], over all generated tokens of this rank
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollmesh.algorithms.segments import Segments
from rollmesh.errors import ReplayError
from rollmesh.types import Group, Int32Array, Sample, StopReason


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sample as the learner sees it.

    Attributes:
        token_ids: int32 [T], prompt and response.
        positions: int32 [G], where the generated tokens stand in ``token_ids``; greater than 0.
    """

    token_ids: Int32Array
    positions: Int32Array


@dataclass(frozen=True, slots=True)
class StepShare:
    """The share of one optimiser step in a batch: consecutive samples, sequences and tokens.

    Attributes:
        groups: the samples of each group.
        tokens: the generated tokens of each sample, those without any included.
        sequences: where the part's sequences begin and end among all.
        columns: where its tokens begin and end in the columns.
    """

    groups: Segments
    tokens: Segments
    sequences: slice
    columns: slice


@dataclass(frozen=True, slots=True)
class Experience:
    """One rank's part of a batch. S samples of G groups, N generated tokens.

    Attributes:
        sequences: those with at least one generated token.
        kept: the samples that count, group after group.
        datasources: of each group; empty for none.
        step_shares: the optimiser steps' shares, in order.
        groups: the samples of each group.
        tokens: the generated tokens of each sample.
        offsets: int64 [N], place of each generated token in its response.
        behaviour: float32 [N], log-probabilities as the engine sampled them.
        reference: float32 [N], the reference's; None where there is none.
        version_numbers: int64 [N], number of the policy version that generated each token.
    """

    sequences: tuple[TokenSequence, ...]
    kept: tuple[tuple[Sample, ...], ...]
    datasources: tuple[str, ...]
    step_shares: tuple[StepShare, ...]
    groups: Segments
    tokens: Segments
    offsets: Tensor
    behaviour: Tensor
    reference: Tensor | None
    version_numbers: Tensor

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.kept for sample in group]

    @property
    def sequence_starts(self) -> list[int]:
        """Where each sequence's tokens begin in the columns."""
        lengths = [len(sequence.positions) for sequence in self.sequences]
        return [0, *itertools.accumulate(lengths)][:-1]

    def rewards(self) -> Tensor:
        """float64 [S]."""
        return torch.tensor([s.score.reward for s in self.samples if s.score], dtype=torch.float64)

    def oldest_versions(self) -> Tensor:
        """int64 [S]; 0 for a sample without generated tokens."""
        return torch.tensor(
            [s.oldest_version.number if s.version_spans else 0 for s in self.samples], dtype=torch.int64
        )

    def is_truncated(self) -> Tensor:
        """bool [S]."""
        return torch.tensor([s.stop_reason is StopReason.LENGTH for s in self.samples], dtype=torch.bool)


def build_experience(groups_by_step: Sequence[Sequence[Group]], needs_reference: bool) -> Experience:
    """Drop aborted samples and line up the arrays.

    Args:
        groups_by_step: this rank's groups of each optimiser step; any of them may be empty.
        needs_reference: reference log-probabilities are used.

    Raises:
        ReplayError: a sample has no score, no prompt, an array of the wrong length, or no reference log-probabilities
            where they are needed.
    """
    by_step = [[_finished(group) for group in groups] for groups in groups_by_step]
    kept = tuple(samples for groups in by_step for samples in groups)
    samples = [sample for group in kept for sample in group]
    for sample in samples:
        _check(sample, needs_reference)
    generated = [sample for sample in samples if sample.num_generated_tokens]
    actions = [np.flatnonzero(sample.action_mask) for sample in generated]
    sequences = tuple(
        TokenSequence(
            token_ids=np.concatenate([sample.prompt_token_ids, sample.response_token_ids]),
            positions=(places + len(sample.prompt_token_ids)).astype(np.int32),
        )
        for sample, places in zip(generated, actions, strict=True)
    )
    reference = None
    if needs_reference:
        of_actions = [_reference(s)[places] for s, places in zip(generated, actions, strict=True)]
        reference = _joined(of_actions, np.float32)
    return Experience(
        sequences=sequences,
        kept=kept,
        datasources=tuple(group.datasource for groups in groups_by_step for group in groups),
        step_shares=_step_shares(by_step),
        groups=_segments([len(group) for group in kept]),
        tokens=_segments([sample.num_generated_tokens for sample in samples]),
        offsets=_joined(actions, np.int64),
        behaviour=_joined([sample.behaviour_logprobs for sample in generated], np.float32),
        reference=reference,
        version_numbers=_joined([_version_numbers(sample) for sample in generated], np.int64),
    )


def _finished(group: Group) -> tuple[Sample, ...]:
    return tuple(sample for sample in group.samples if sample.stop_reason is not StopReason.ABORTED)


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
    spans = sample.version_spans
    return np.repeat([span.version.number for span in spans], [span.length for span in spans])


def _reference(sample: Sample) -> np.ndarray:
    assert sample.reference_logprobs is not None  # checked before
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
