"""Whitening over a whole batch, and running moments over a whole run. Both span all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rollmesh.algorithms.reduction import SumOverRanks, alone

VARIANCE_FLOOR = 1e-8


def whiten(values: Tensor, should_scale: bool = True, sum_over_ranks: SumOverRanks = alone) -> Tensor:
    """Return ``(x - mean) / sqrt(max(variance, 1e-8))`` with the population variance over all values of all ranks.

    The variance is computed in a second pass, because a large mean would take its digits away in a single pass.

    Args:
        values: [N], the values of this rank; may be empty.
        should_scale: False subtracts the mean and does not divide.
        sum_over_ranks: collective.

    Returns:
        [N], of the dtype of ``values``.

    Example: 1, 2, 3, 6 have the mean 3 and the population variance (4 + 1 + 0 + 9) / 4 = 3.5.

        >>> whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        tensor([-1.0690, -0.5345,  0.0000,  1.6036])
        >>> whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]), should_scale=False).tolist()
        [-2.0, -1.0, 0.0, 3.0]
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
    """Mean and population variance of all values so far, merged batch by batch (Chan et al., 1979).

    Attributes:
        count: number of values so far.
        mean: mean of these values.
        squares: sum of their squared distances from the mean.

    Example: 1 and 2, then 3 and 6. The mean is 3, and the squared distances 4, 1, 0 and 9 sum to 14.

        >>> first = RunningMoments().merged(torch.tensor([1.0, 2.0]))
        >>> first.merged(torch.tensor([3.0, 6.0]))
        RunningMoments(count=4.0, mean=3.0, squares=14.0)
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, values: Tensor, sum_over_ranks: SumOverRanks = alone) -> RunningMoments:
        """Return the moments with the values of one more batch. Collective: two sums."""
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
        """Return ``(x - mean) / sqrt(max(variance, 1e-8))``, of the dtype of ``values``."""
        variance = self.squares / self.count if self.count else 0.0
        deviation = math.sqrt(max(variance, VARIANCE_FLOOR))
        return ((values.double() - self.mean) / deviation).to(values.dtype)
