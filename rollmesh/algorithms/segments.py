"""Tokens of many sequences in one flat tensor, and sums along each sequence without a Python loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Tokens that `Segments.discounted_sums` folds with one matrix product."""


class Segments:
    """How a flat tensor of N values is cut into S consecutive parts, some of which may be empty.

    The parts are the tokens of each sequence, or the samples of each group.

    Args:
        lengths: int64 [S], not negative.

    Attributes:
        lengths: int64 [S].
        size: N.
        index: int64 [N], the part that each value belongs to.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.size = int(lengths.sum())
        self.index = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths, output_size=self.size
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> Tensor:
        """int64 [S], one past the last value of each part."""
        return self.lengths.cumsum(0)

    @property
    def is_empty(self) -> Tensor:
        """bool [S]."""
        return self.lengths == 0

    def spread(self, values: Tensor) -> Tensor:
        """[S] to [N]: every value gets that of its part. Differentiable."""
        return values[self.index]

    def sums(self, values: Tensor) -> Tensor:
        """[N] to [S]; 0 where empty. Differentiable."""
        return values.new_zeros(len(self)).index_add(0, self.index, values)

    def means(self, values: Tensor) -> Tensor:
        """[N] to [S]; 0 where empty. Differentiable."""
        return self.sums(values) / self.lengths.clamp(min=1).to(values.dtype)

    def last(self, values: Tensor) -> Tensor:
        """[S] to [N]: each part's value at its last place, 0 elsewhere; the value of an empty part is lost."""
        placed = values.new_zeros(self.size)
        placed[(self.ends - 1)[~self.is_empty]] = values[~self.is_empty]
        return placed

    def next(self, values: Tensor) -> Tensor:
        """[N]: the value that follows in the same part, 0 at its end."""
        shifted = torch.zeros_like(values)
        if self.size:
            shifted[:-1] = values[1:]
            shifted[(self.ends - 1)[~self.is_empty]] = 0
        return shifted

    def discounted_sums(self, values: Tensor, discount: float) -> Tensor:
        """``y[j] = values[j] + discount · y[j + 1]`` within each part, 0 past its end.

        Parts are cut into blocks, and a block is one row of a matrix product with the powers of ``discount``; what
        comes into a block from the right is the same sum over blocks with ``discount ** BLOCK``. So the depth is
        log N / log BLOCK, every power is at most 1, and no intermediate grows.

        Args:
            values: float [N].
            discount: 0 to 1.

        Returns:
            [N], of the dtype of ``values``.
        """
        if self.size == 0:
            return values.clone()
        num_blocks = (self.lengths + BLOCK - 1) // BLOCK
        blocks = Segments(num_blocks)
        steps = torch.arange(BLOCK, device=values.device)
        # Every part begins a block, so all blocks but the last of a part are full.
        in_last = self.lengths[~self.is_empty] - (num_blocks[~self.is_empty] - 1) * BLOCK
        filled = torch.full((blocks.size,), BLOCK, device=values.device)
        filled[(blocks.ends - 1)[~self.is_empty]] = in_last
        is_value = steps < filled[:, None]
        rows = values.new_zeros(blocks.size, BLOCK).masked_scatter_(is_value, values)
        distance = (steps[:, None] - steps[None, :]).to(values.dtype)  # from the column's place to the row's
        powers = torch.where(distance >= 0, discount ** distance.clamp(min=0), torch.zeros_like(distance))
        folded = rows @ powers
        if blocks.size > len(in_last):  # some part has more than one block
            totals = blocks.discounted_sums(folded[:, 0].contiguous(), discount**BLOCK)
            folded.addr_(blocks.next(totals), discount ** (BLOCK - steps).to(values.dtype))
        return folded[is_value]
