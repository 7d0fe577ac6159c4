"""The placement of sequences of many lengths in the rectangle of tokens that one forward pass reads.

::

    sequences  A = a a a a   B = b b   C = c

    packed                     [a a a a]   position_ids 0 1 2 3
                               [b b c ·]                0 1 0 1
    packed in one row          [a a a a b b c]          0 1 2 3 0 1 0
    padded                     [a a a a]                0 1 2 3
                               [b b · ·]                0 1 2 3
                               [c · · ·]                0 1 2 3
    single                     [a a a a], [b b], [c]: three passes

`position_ids` restart at 0 with every sequence. This keeps the sequences of a row apart in layers that follow the
positions:
transformers derives a block-diagonal causal mask from them where no attention mask and no cache are given, and flash
attention derives its sequence lengths from them. Layers that read the row as one stream (linear attention, state
spaces, convolutions) do not follow them; `probe` finds that out.

The cells after the last sequence of a row continue the positions of that sequence. No token sees a later token, so no
token of a sequence sees these cells, and no attention mask is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollmesh.types import Int32Array

Row = tuple[int, ...]
"""Indices of the sequences that share a row, in order."""
Layout = tuple[Row, ...]
"""The rows of one forward pass."""


class Batching(StrEnum):
    """How sequences share a forward pass; see the module's picture."""

    PACKED = "packed"
    PACKED_IN_ONE_ROW = "packed in one row"
    """For flash attention, which takes packed sequences in batches of one row only, and skips forbidden cells."""
    PACKED_WITH_BOUNDARIES = "packed in one row, with boundaries"
    """The model also gets the places where sequences begin (`Boundaries`)."""
    PADDED = "padded"
    SINGLE = "single"

    @property
    def is_one_row(self) -> bool:
        return self in (Batching.PACKED_IN_ONE_ROW, Batching.PACKED_WITH_BOUNDARIES)

    @property
    def is_packed(self) -> bool:
        return self is Batching.PACKED or self.is_one_row


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where the S sequences of one row begin, in the forms that layers of transformers take.

    Attributes:
        cu_seq_lens: int32 [S + 1], 0 and then the end of each sequence: lengths 4, 2, 1 give 0, 4, 6, 7.
        seq_idx: int32 [1, L], the number of each token's sequence: 0 0 0 0 1 1 2.
        max_length: tokens of the longest sequence.

    Example:

        >>> found = Boundaries.of_lengths([4, 2, 1])
        >>> found.cu_seq_lens.tolist(), found.seq_idx.tolist(), found.max_length
        ([0, 4, 6, 7], [[0, 0, 0, 0, 1, 1, 2]], 4)
    """

    cu_seq_lens: Tensor
    seq_idx: Tensor
    max_length: int

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Boundaries:
        counts = torch.tensor(lengths, dtype=torch.int32)
        numbers = torch.arange(len(lengths), dtype=torch.int32)
        return cls(
            cu_seq_lens=torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)]),
            seq_idx=numbers.repeat_interleave(counts)[None],
            max_length=max(lengths),
        )

    def to(self, device: torch.device) -> Boundaries:
        return Boundaries(self.cu_seq_lens.to(device), self.seq_idx.to(device), self.max_length)

    def arguments(self) -> dict[str, Any]:
        """Return the boundaries under the argument names that forward passes of transformers have."""
        return {
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            "seq_idx": self.seq_idx,
        }


class AcceptedInputs:
    """The arguments beside the token ids that a model's forward pass takes, by name or with ``**kwargs``.

    A model that takes no positions does not keep packed sequences apart; the probe finds that out.
    """

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._names = frozenset(parameters)
        self._takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

    def __call__(self, position_ids: Tensor, boundaries: Boundaries | None) -> dict[str, Any]:
        """Return the arguments that the model takes, by name."""
        known: dict[str, Any] = {"position_ids": position_ids}
        if boundaries is not None:
            known.update(boundaries.arguments())
        return {name: value for name, value in known.items() if self._takes_all or name in self._names}


@dataclass(frozen=True, slots=True)
class Rectangle:
    """The tokens of one forward pass, rows × L.

    Attributes:
        input_ids: int64 [rows, L].
        position_ids: int64 [rows, L], restarting at every sequence.
        boundaries: the boundaries of the only row; None where the model does not get them.
        starts: the flat index of each sequence's first token, in the order of the layout.
    """

    input_ids: Tensor
    position_ids: Tensor
    boundaries: Boundaries | None
    starts: tuple[int, ...]


def lay_out(sequences: Sequence[Int32Array], layout: Layout, batching: Batching) -> Rectangle:
    """Place sequences in their rows, on the CPU.

    Args:
        sequences: token ids int32 [T] of each sequence; the layout chooses among them.
        layout: the sequences of each row; a single row for the one-row ways of batching.
        batching: decides whether the rectangle has boundaries.
    """
    row_length = max(_length(sequences, row) for row in layout)
    input_ids = np.zeros((len(layout), row_length), dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    starts: list[int] = []
    for number, row in enumerate(layout):
        start = 0
        for index in row:
            token_ids = sequences[index]
            input_ids[number, start : start + len(token_ids)] = token_ids
            position_ids[number, start:] = np.arange(row_length - start)  # the next sequence overwrites what it covers
            starts.append(number * row_length + start)
            start += len(token_ids)
    boundaries = None
    if batching is Batching.PACKED_WITH_BOUNDARIES:
        assert len(layout) == 1
        boundaries = Boundaries.of_lengths([len(sequences[index]) for index in layout[0]])
    return Rectangle(torch.from_numpy(input_ids), torch.from_numpy(position_ids), boundaries, tuple(starts))


def _length(sequences: Sequence[Int32Array], row: Iterable[int]) -> int:
    return sum(len(sequences[index]) for index in row)
