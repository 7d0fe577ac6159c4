"""The sum over the ranks of the learner: the only collective operation that the maths needs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SumOverRanks(Protocol):
    """A function that sums a tensor over all ranks. Every rank calls it with the same shapes, in the same order."""

    def __call__(self, values: Tensor, /) -> Tensor:
        """Return the sum, on every rank."""
        ...


def alone(values: Tensor) -> Tensor:
    """Return the values: the sum over the ranks of a single process."""
    return values
