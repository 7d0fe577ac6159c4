"""The one thing that the maths asks of a process group: the sum over its ranks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SumOverRanks(Protocol):
    """Adds a tensor up over all ranks of the learner. Every rank calls it with the same shape, in the same order."""

    def __call__(self, values: Tensor, /) -> Tensor:
        """The sum, on every rank."""
        ...


def alone(values: Tensor) -> Tensor:
    """The sum over the ranks of a single process."""
    return values
