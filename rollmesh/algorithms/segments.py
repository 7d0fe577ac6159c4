"""A flat tensor that is cut into segments, and sums along each segment without a Python loop over the values."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Values that `Segments.discounted_sums` folds with one matrix product."""


class Segments:
    """The cut of a flat tensor of N values into S consecutive segments. A segment may be empty.

    The segments are the tokens of each sequence, or the samples of each group.

    Args:
        lengths: int64 [S], not negative.

    Attributes:
        lengths: int64 [S].
        size: N.
        index: int64 [N], the number of each value's segment.

    Example: five values in segments of 2, 0 and 3.

        >>> segments = Segments(torch.tensor([2, 0, 3]))
        >>> segments.index.tolist()
        [0, 0, 2, 2, 2]
        >>> segments.sums(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [3.0, 0.0, 12.0]
        >>> segments.means(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [1.5, 0.0, 4.0]
        >>> segments.spread(torch.tensor([7.0, 8.0, 9.0])).tolist()
        [7.0, 7.0, 9.0, 9.0, 9.0]
        >>> segments.last(torch.tensor([7.0, 8.0, 9.0])).tolist()
        [0.0, 7.0, 0.0, 0.0, 9.0]
        >>> segments.next(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [2.0, 0.0, 4.0, 5.0, 0.0]
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
        """int64 [S], the index after the last value of each segment."""
        return self.lengths.cumsum(0)

    @property
    def is_empty(self) -> Tensor:
        """bool [S], whether each segment has no values."""
        return self.lengths == 0

    def spread(self, values: Tensor) -> Tensor:
        """Return [N] from [S]: each place gets the value of its segment. Differentiable."""
        return values[self.index]

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of each segment, [S] from [N]; 0 for an empty segment. Differentiable."""
        return values.new_zeros(len(self)).index_add(0, self.index, values)

    def means(self, values: Tensor) -> Tensor:
        """Return the mean of each segment, [S] from [N]; 0 for an empty segment. Differentiable."""
        return self.sums(values) / self.lengths.clamp(min=1).to(values.dtype)

    def last(self, values: Tensor) -> Tensor:
        """Return [N] from [S]: each segment's value at the segment's last place, and 0 elsewhere.

        The value of an empty segment is left out.
        """
        placed = values.new_zeros(self.size)
        placed[(self.ends - 1)[~self.is_empty]] = values[~self.is_empty]
        return placed

    def next(self, values: Tensor) -> Tensor:
        """Return the next value of the same segment, [N] from [N]; 0 at the segment's end."""
        shifted = torch.zeros_like(values)
        if self.size:
            shifted[:-1] = values[1:]
            shifted[(self.ends - 1)[~self.is_empty]] = 0
        return shifted

    def discounted_sums(self, values: Tensor, discount: float) -> Tensor:
        """Return ``y[j] = values[j] + discount · y[j + 1]`` within each segment; y is 0 past the segment's end.

        Each segment is cut into blocks. One matrix product with the powers of ``discount`` folds all blocks, one block
        a row. The sum that enters a block from the right is a discounted sum over the blocks, with the discount
        ``discount ** BLOCK``. So the depth of the recursion is log N / log BLOCK, every power is at most 1, and no
        intermediate value grows.

        Args:
            values: float [N].
            discount: 0 to 1.

        Returns:
            [N], of the dtype of ``values``.

        Example: segments of 3 and 1, discount 0.5. 3, then 2 + 0.5 · 3 = 3.5, then 1 + 0.5 · 3.5 = 2.75.

            >>> Segments(torch.tensor([3, 1])).discounted_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5).tolist()
            [2.75, 3.5, 3.0, 4.0]
        """
        if self.size == 0:
            return values.clone()
        num_blocks = (self.lengths + BLOCK - 1) // BLOCK
        blocks = Segments(num_blocks)
        steps = torch.arange(BLOCK, device=values.device)
        # Every segment begins a block, so all blocks of a segment but its last are full.
        in_last = self.lengths[~self.is_empty] - (num_blocks[~self.is_empty] - 1) * BLOCK
        filled = torch.full((blocks.size,), BLOCK, device=values.device)
        filled[(blocks.ends - 1)[~self.is_empty]] = in_last
        is_value = steps < filled[:, None]
        rows = values.new_zeros(blocks.size, BLOCK).masked_scatter_(is_value, values)
        distance = (steps[:, None] - steps[None, :]).to(values.dtype)  # of the row's place behind the column's
        powers = torch.where(distance >= 0, discount ** distance.clamp(min=0), torch.zeros_like(distance))
        folded = rows @ powers
        if blocks.size > len(in_last):  # some segment has more than one block
            totals = blocks.discounted_sums(folded[:, 0].contiguous(), discount**BLOCK)
            folded.addr_(blocks.next(totals), discount ** (BLOCK - steps).to(values.dtype))
        return folded[is_value]
