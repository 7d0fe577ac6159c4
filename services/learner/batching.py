"""Packing: sequences of many lengths into few forward passes of bounded size, without one seeing another.

A micro-batch is a rectangle of rows as long as its longest sequence; shorter sequences share rows. `position_ids`
restart at 0 with every sequence, and that alone keeps them apart: transformers derives a block-diagonal causal mask
from it wherever no attention mask and no cache are given, and flash attention derives its sequence lengths. Short rows
matter: the cost of attention with a mask grows with tokens × row length, and a batch in one single row would be
quadratic in its tokens. Flash attention skips what the mask forbids, and reads only batches of one row: it gets one.

What is left of a row continues the positions of its last sequence; being later, it is seen by nobody.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.learner.experience import Sequence

Row = tuple[int, ...]
"""Indices of the sequences that share a row, in order."""
Layout = tuple[Row, ...]
"""The rows of one micro-batch."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass. L is the row length, N the generated tokens in it (0 for an empty one).

    Attributes:
        input_ids: int64 [rows, L].
        position_ids: int64 [rows, L], restarting at every sequence.
        predictors: int64 [N], flat index into ``rows × L`` of the position whose logits predict the token.
        targets: int64 [N], the generated tokens.
        behaviour_logprobs: float32 [N].
        reference_logprobs: float32 [N], or None where there is no reference.
        advantages: float32 [N].
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    behaviour_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return MicroBatch(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            predictors=move(self.predictors),
            targets=move(self.targets),
            behaviour_logprobs=move(self.behaviour_logprobs),
            reference_logprobs=None if self.reference_logprobs is None else move(self.reference_logprobs),
            advantages=move(self.advantages),
        )


def plan_layouts(lengths: SequenceOf[int], token_budget: int, is_single_row: bool = False) -> list[Layout]:
    """Distribute sequences over micro-batches of at most ``token_budget`` tokens, padding included.

    Longest first; each goes to the fullest row that still holds it, else to a new row, else to the next micro-batch.
    A sequence longer than the budget has a micro-batch of its own. O(n log n) for each micro-batch.

    Args:
        lengths: tokens of each sequence, at least 1.
        token_budget: rows × row length at most.
        is_single_row: one row as long as what is in it, for flash attention.

    Returns:
        Micro-batches; every index appears once.
    """
    remaining = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    layouts: list[Layout] = []
    while remaining:
        row_length = max(token_budget if is_single_row else 0, lengths[remaining[0]])
        max_rows = max(1, token_budget // row_length)
        rows: list[list[int]] = []
        free: list[tuple[int, int]] = []  # (free tokens, row), sorted
        left: list[int] = []
        for index in remaining:
            length = lengths[index]
            place = bisect.bisect_left(free, (length, -1))
            if place < len(free):
                space, row = free.pop(place)
            elif len(rows) < max_rows:
                space, row = row_length, len(rows)
                rows.append([])
            else:
                left.append(index)
                continue
            rows[row].append(index)
            bisect.insort(free, (space - length, row))
        layouts.append(tuple(tuple(row) for row in rows))
        remaining = left
    return layouts


def pack(sequences: SequenceOf[Sequence], layout: Layout) -> MicroBatch:
    """Build the tensors of one micro-batch, on the CPU."""
    row_length = max(sum(len(sequences[index].token_ids) for index in row) for row in layout)
    input_ids = np.zeros((len(layout), row_length), dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    members: list[Sequence] = []
    predictors: list[np.ndarray] = []
    for number, row in enumerate(layout):
        start = 0
        for index in row:
            sequence = sequences[index]
            length = len(sequence.token_ids)
            input_ids[number, start : start + length] = sequence.token_ids
            # To the end of the row: the next sequence overwrites it, and what nobody overwrites is the padding.
            position_ids[number, start:] = np.arange(row_length - start)
            predictors.append(sequence.positions.astype(np.int64) + (number * row_length + start - 1))
            members.append(sequence)
            start += length
    has_reference = members[0].reference_logprobs is not None
    references = [s.reference_logprobs for s in members if s.reference_logprobs is not None]
    flat_predictors = np.concatenate(predictors)
    counts = [len(sequence.positions) for sequence in members]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        predictors=torch.from_numpy(flat_predictors),
        targets=torch.from_numpy(input_ids.reshape(-1)[flat_predictors + 1]),
        behaviour_logprobs=torch.from_numpy(np.concatenate([s.behaviour_logprobs for s in members])),
        reference_logprobs=torch.from_numpy(np.concatenate(references)) if has_reference else None,
        advantages=torch.from_numpy(np.repeat(np.array([s.advantage for s in members], dtype=np.float32), counts)),
    )


def empty_micro_batch(has_reference: bool) -> MicroBatch:
    """Two tokens of which none was generated: gradients of exactly 0, for a rank that has fewer passes than others."""
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros((1, 2), dtype=torch.int64),
        position_ids=torch.arange(2)[None],
        predictors=none,
        targets=none,
        behaviour_logprobs=torch.zeros(0),
        reference_logprobs=torch.zeros(0) if has_reference else None,
        advantages=torch.zeros(0),
    )
