"""Packing: sequences of many lengths into few forward passes of bounded size.

A micro-batch is a rectangle of rows as long as its longest sequence; shorter sequences share rows, if the model keeps
them apart (`rollmesh.models.rows`). Short rows matter: the cost of attention with a mask grows with tokens × row
length, and a batch in one single row would be quadratic in its tokens.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from rollmesh.algorithms.segments import Segments
from rollmesh.models.rows import Batching, Boundaries, Layout, lay_out
from services.learner.experience import TokenSequence


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """What is known of N generated tokens; columns of a whole batch, or of what is in one micro-batch.

    Attributes:
        behaviour: float32 [N], log-probabilities as the engine sampled them.
        advantages: float32 [N].
        loss_weights: float64 [N], of each token in the policy's loss (`rollmesh.algorithms.aggregate`).
        versions_apart: int64 [N], policy versions between the one that generated the token and the learner's.
        reference: float32 [N], the reference's log-probabilities; None where there is none.
        old: float32 [N], the learner's at the start of the batch; None where they are those of this very pass.
        values: float32 [N], the critic's at the start of the batch; None without critic.
        returns: float32 [N], the critic's targets; None without critic.
        is_kept: bool [N], tokens that a mask over the whole step keeps; None keeps all.
    """

    behaviour: Tensor
    advantages: Tensor
    loss_weights: Tensor
    versions_apart: Tensor
    reference: Tensor | None = None
    old: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    is_kept: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenColumns:
        """All columns that are there, changed alike."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(c) for name, c in columns.items() if c is not None})


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass. L is the row length, N the generated tokens in it (0 for an empty one).

    Attributes:
        input_ids: int64 [rows, L].
        position_ids: int64 [rows, L], restarting at every sequence.
        predictors: int64 [N], flat index into ``rows × L`` of the position whose logits predict the token.
        targets: int64 [N], the generated tokens.
        places: int64 [N], where the tokens stand in the columns of the whole batch.
        tokens: the generated tokens of each sequence; sequences are whole.
        columns: what the loss knows of the tokens.
        boundaries: of the sequences in its only row; None where the model is not told.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    places: Tensor
    tokens: Segments
    columns: TokenColumns
    boundaries: Boundaries | None = None

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
            places=move(self.places),
            tokens=Segments(move(self.tokens.lengths)),
            columns=self.columns.each(move),
            boundaries=self.boundaries and self.boundaries.to(device),
        )


def plan_layouts(lengths: Sequence[int], token_budget: int, batching: Batching = Batching.PACKED) -> list[Layout]:
    """Distribute sequences over micro-batches of at most ``token_budget`` tokens, padding included.

    Longest first; each goes to the fullest row that still holds it, else to a new row, else to the next micro-batch.
    A sequence longer than the budget has a micro-batch of its own. O(n log n) for each micro-batch.

    Args:
        lengths: tokens of each sequence, at least 1.
        token_budget: rows × row length at most.
        batching: how sequences may share a micro-batch.

    Returns:
        Micro-batches; every index appears once.
    """
    remaining = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if batching is Batching.SINGLE:
        return [((index,),) for index in remaining]
    layouts: list[Layout] = []
    while remaining:
        row_length = max(token_budget if batching.is_one_row else 0, lengths[remaining[0]])
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
            if batching.is_packed:
                bisect.insort(free, (space - length, row))
        layouts.append(tuple(tuple(row) for row in rows))
        remaining = left
    return layouts


def pack(
    sequences: Sequence[TokenSequence],
    starts: Sequence[int],
    layout: Layout,
    columns: TokenColumns,
    batching: Batching = Batching.PACKED,
) -> MicroBatch:
    """Build the tensors of one micro-batch, on the CPU.

    Args:
        sequences: of which the layout's are taken.
        starts: where the generated tokens of each of them begin in the columns.
        layout: which sequences, in which rows; as `plan_layouts` made it for ``batching``.
        columns: of the whole batch.
        batching: whether the model is told where sequences begin.
    """
    rectangle = lay_out([sequence.token_ids for sequence in sequences], layout, batching)
    order = [index for row in layout for index in row]
    predictors = [
        sequences[index].positions.astype(np.int64) + (start - 1)
        for index, start in zip(order, rectangle.starts, strict=True)
    ]
    places = [np.arange(starts[index], starts[index] + len(sequences[index].positions)) for index in order]
    flat_predictors = torch.from_numpy(np.concatenate(predictors))
    in_columns = torch.from_numpy(np.concatenate(places))
    return MicroBatch(
        input_ids=rectangle.input_ids,
        position_ids=rectangle.position_ids,
        predictors=flat_predictors,
        targets=rectangle.input_ids.flatten()[flat_predictors + 1],
        places=in_columns,
        tokens=Segments(torch.tensor([len(place) for place in places])),
        columns=columns.each(lambda column: column[in_columns]),
        boundaries=rectangle.boundaries,
    )


def empty_micro_batch(columns: TokenColumns) -> MicroBatch:
    """Two tokens of which none was generated: gradients of exactly 0, for a rank that has fewer passes than others."""
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros((1, 2), dtype=torch.int64),
        position_ids=torch.arange(2)[None],
        predictors=none,
        targets=none,
        places=none,
        tokens=Segments(none),
        columns=columns.each(lambda column: column[:0]),
    )


def balance(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Split groups over ranks by tokens: Karmarkar and Karp's differencing method, for sums as equal as possible.

    Deterministic, so every rank computes the same split. A rank may get none.

    Returns:
        For each rank the indices of its groups, ascending.
    """
    # Each entry is a partial solution: per rank a load and what is in it, largest load first. The two with the widest
    # spread are merged, the heaviest part of the one with the lightest of the other, until one is left.
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for index, load in enumerate(num_tokens):
        heap.append((-load, index, [(load, [index]), *((0, []) for _ in range(num_ranks - 1))]))
    heapq.heapify(heap)
    if not heap:
        return [[] for _ in range(num_ranks)]
    while len(heap) > 1:
        _, order, wide = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = [(a + b, left + right) for (a, left), (b, right) in zip(wide, reversed(other), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], order, merged))
    return [sorted(indices) for _, indices in heap[0][2]]


def split_batch(num_tokens: Sequence[int], num_steps: int, num_ranks: int) -> list[list[list[int]]]:
    """Cut a batch into optimiser steps, in its order and as evenly as it goes, and each of them over the ranks.

    Returns:
        For each optimiser step and each rank the indices of its groups, ascending.
    """
    bounds = [len(num_tokens) * number // num_steps for number in range(num_steps + 1)]
    steps = []
    for first, end in itertools.pairwise(bounds):
        shares = balance(num_tokens[first:end], num_ranks)
        steps.append([[first + index for index in share] for share in shares])
    return steps
