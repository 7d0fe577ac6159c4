"""Whitening over a whole batch, and running moments over a whole run; both over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rollmesh.algorithms.reduction import SumOverRanks, alone

VARIANCE_FLOOR = 1e-8


def whiten(values: Tensor, should_scale: bool = True, sum_over_ranks: SumOverRanks = alone) -> Tensor:
    """``(x - mean) / sqrt(max(variance, 1e-8))`` with the population variance over all values of all ranks.

    Two passes, so that a large mean does not eat the variance.

    Args:
        values: [N], those of this rank; may be empty.
        should_scale: off subtracts the mean alone.
        sum_over_ranks: collective.

    Returns:
        [N], of the dtype of ``values``.
    """
    exact = values.double()
    total, count = sum_over_ranks(torch.stack([exact.sum(), exact.new_tensor(float(len(exact)))]))
    centred: Tensor = exact - total / count.clamp(min=1)
    if should_scale:
        squares = sum_over_ranks(centred.square().sum().reshape(1))[0]
        centred = centred / (squares / count.clamp(min=1)).clamp(min=VARIANCE_FLOOR).sqrt()
    return centred.to(values.dtype)


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Mean and population variance of everything seen so far, merged batch by batch (Chan et al., 1979).

    Attributes:
        count: values seen.
        mean: of them.
        squares: sum of squared distances from the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, values: Tensor, sum_over_ranks: SumOverRanks = alone) -> RunningMoments:
        """With the values of one batch. Collective: two sums."""
        exact = values.double()
        total, count = sum_over_ranks(torch.stack([exact.sum(), exact.new_tensor(float(len(exact)))])).tolist()
        if count == 0:
            return self
        mean = total / count
        (squares,) = sum_over_ranks((exact - mean).square().sum().reshape(1)).tolist()
        both, apart = self.count + count, mean - self.mean
        return RunningMoments(
            count=both,
            mean=self.mean + apart * count / both,
            squares=self.squares + squares + apart * apart * self.count * count / both,
        )

    def normalise(self, values: Tensor) -> Tensor:
        """``(x - mean) / sqrt(max(variance, 1e-8))``, of the dtype of ``values``."""
        variance = self.squares / self.count if self.count else 0.0
        deviation = math.sqrt(max(variance, VARIANCE_FLOOR))
        return ((values.double() - self.mean) / deviation).to(values.dtype)
