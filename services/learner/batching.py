"""Micro-batches: sequences of many lengths, placed in few forward passes of bounded size.

A micro-batch is a rectangle of rows, as long as its longest sequence. Shorter sequences share a row if the model keeps
the sequences of a row apart (`rollmesh.models.rows`). Rows are short because the cost of attention with a mask grows
with tokens × row length: in a single row, the cost would be quadratic in the tokens of the micro-batch.
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
    """The values of N generated tokens, one column a quantity: the tokens of a batch, or of one micro-batch.

    Attributes:
        behaviour: float32 [N], log-probabilities with which the engine sampled.
        advantages: float32 [N], advantages.
        loss_weights: float64 [N], weights of the tokens in the policy's loss (`rollmesh.algorithms.aggregate`).
        versions_apart: int64 [N], the learner's version minus the version that generated the token.
        reference: float32 [N], log-probabilities of the reference model; None without a reference.
        old: float32 [N], log-probabilities of the policy at the start of the batch; None where the log-probabilities
            of the training pass itself are used instead.
        values: float32 [N], values of the critic at the start of the batch; None without a critic.
        returns: float32 [N], targets of the critic; None without a critic.
        is_kept: bool [N], False at the tokens that the correction `m2po` drops; None keeps all tokens.
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
        """Return columns with ``change`` applied to each column that is not None."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(c) for name, c in columns.items() if c is not None})


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass. L is the row length, N the number of generated tokens, which may be 0.

    Attributes:
        input_ids: int64 [rows, L].
        position_ids: int64 [rows, L], restarting at every sequence.
        predictors: int64 [N], flat index into ``rows × L`` of the position whose logits predict the token.
        targets: int64 [N], the generated tokens.
        places: int64 [N], places of the tokens in the columns of the whole batch.
        tokens: the generated tokens of each sequence; every sequence is whole.
        columns: the columns of these N tokens.
        boundaries: the boundaries of the sequences in the only row; None where the model does not get them.
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

    The longest sequence comes first. Each sequence goes to the fullest row that still holds the sequence, else to a new
    row, else to the next micro-batch. A sequence longer than the budget gets a micro-batch of its own. O(n log n) for
    each micro-batch.

    Args:
        lengths: tokens of each sequence, at least 1.
        token_budget: the largest permitted rows × row length.
        batching: the way in which sequences share a micro-batch.

    Returns:
        The layout of each micro-batch; every index appears once.

    Example: two rows of 6 tokens would exceed the budget of 8, so the longest sequence is alone. The other three
    sequences share a micro-batch of two rows of 4 tokens.

        >>> plan_layouts([2, 4, 2, 6], token_budget=8)
        [((3,),), ((1,), (0, 2))]
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
        sequences: all sequences of the batch; the layout chooses among them.
        starts: the place of each sequence's first generated token in the columns.
        layout: the sequences of each row, from `plan_layouts` for the same ``batching``.
        columns: the columns of the whole batch.
        batching: decides whether the micro-batch has boundaries.
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
    """Return a micro-batch of two tokens, neither of them generated, whose gradients are exactly 0.

    A rank with fewer micro-batches than the other ranks fills its passes with empty micro-batches.
    """
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
    """Split groups over ranks so that the ranks have nearly equal numbers of tokens.

    The split is the largest differencing method of Karmarkar and Karp (1982). The method is deterministic, so every
    rank computes the same split. A rank may get no group.

    Args:
        num_tokens: tokens of each group.
        num_ranks: number of ranks.

    Returns:
        For each rank the indices of its groups, ascending.

    Example: five groups of 30 tokens over two ranks. The ranks get 4 + 5 + 7 = 16 and 6 + 8 = 14 tokens.

        >>> balance([4, 5, 6, 7, 8], 2)
        [[0, 1, 3], [2, 4]]
    """
    # Each entry is a partial solution: for each share its load and its groups, largest load first. The two entries with
    # the widest spread between largest and smallest load are merged: the heaviest share of the first joins the lightest
    # share of the second, and so on. The last entry is the split.
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
    """Cut a batch into optimiser steps of nearly equal numbers of groups, and split each step over the ranks.

    The order of the batch is kept: the first step gets the first groups.

    Args:
        num_tokens: tokens of each group of the batch, in its order.
        num_steps: optimiser steps in one pass over the batch.
        num_ranks: number of ranks.

    Returns:
        For each optimiser step, and in it for each rank, the indices of the groups, ascending.

    Example: two steps over two ranks.

        >>> split_batch([4, 5, 6, 7], num_steps=2, num_ranks=2)
        [[[1], [0]], [[3], [2]]]
    """
    bounds = [len(num_tokens) * number // num_steps for number in range(num_steps + 1)]
    steps = []
    for first, end in itertools.pairwise(bounds):
        shares = balance(num_tokens[first:end], num_ranks)
        steps.append([[first + index for index in share] for share in shares])
    return steps
