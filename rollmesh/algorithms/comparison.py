"""Comparison of the samples of a prompt with each other: weighted means and deviations within groups.

A sample is compared with every sample of its group, itself included. Each pair has a weight, which depends on the
policy versions of the two samples. Where all weights are 1, the results are the plain mean and the sample deviation.

==============  =========================================
`allow`         1
`same_version`  1 where both samples began under the same version, else 0
`weight`        1 / (1 + difference of the two versions)
==============  =========================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.segments import Segments


class Comparison:
    """The pairs of samples that are compared, and their weights. O(sum of squared group sizes).

    Args:
        groups: the samples of group after group; S in all.
        versions: int64 [S], the policy version's number under which each sample began.
        mixed_version: `allow`, `same_version` or `weight`.

    Example: one group with the rewards 1, 0 and 2 and the versions 4, 4 and 5. With `weight` the first sample gives the
    weights 1, 1 and 0.5, so its mean is (1 + 0 + 0.5 · 2) / 2.5 = 0.8.

        >>> rewards, versions = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([4, 4, 5])
        >>> group = Segments(torch.tensor([3]))
        >>> Comparison(group, versions, "allow").mean(rewards).tolist()
        [1.0, 1.0, 1.0]
        >>> Comparison(group, versions, "same_version").mean(rewards).tolist()
        [0.5, 0.5, 2.0]
        >>> Comparison(group, versions, "weight").mean(rewards).tolist()
        [0.8, 0.8, 1.25]
        >>> Comparison(group, versions, "allow").mean_of_others(rewards).tolist()
        [1.0, 1.5, 0.5]
        >>> Comparison(group, versions, "allow").deviation(rewards).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, groups: Segments, versions: Tensor, mixed_version: str = "allow") -> None:
        sizes = groups.spread(groups.lengths)  # [S], of each sample's group
        pairs = Segments(sizes)
        self._pairs = pairs
        starts = groups.spread(groups.ends - groups.lengths)
        offset = torch.arange(pairs.size, device=sizes.device) - pairs.spread(pairs.ends - sizes)
        self._other = pairs.spread(starts) + offset
        apart = (versions[pairs.index] - versions[self._other]).abs()
        if mixed_version == "allow":
            weights = torch.ones_like(apart, dtype=torch.float64)
        elif mixed_version == "same_version":
            weights = (apart == 0).double()
        else:
            weights = 1.0 / (1.0 + apart.double())
        self._weights = weights
        self._is_self = self._other == pairs.index

    def mean(self, values: Tensor) -> Tensor:
        """Return the weighted mean over each sample's group, float64 [S]."""
        return self._pairs.sums(self._weights * values.double()[self._other]) / self._pairs.sums(self._weights)

    def mean_of_others(self, values: Tensor) -> Tensor:
        """Return the weighted mean over the other samples of the group, float64 [S].

        A sample without others (none, or all of weight 0) gets its own value.
        """
        weights = torch.where(self._is_self, 0.0, self._weights)
        total = self._pairs.sums(weights)
        others = self._pairs.sums(weights * values.double()[self._other]) / total.clamp(min=1e-300)
        return torch.where(total > 0, others, values.double())

    def deviation(self, values: Tensor) -> Tensor:
        """Return the root of the unbiased weighted variance around each sample's mean, float64 [S].

        The variance is ``Σ w (x - mean)² / (Σ w - Σ w² / Σ w)``, which is the sample variance where all weights are 1.
        A sample without others gets 0.
        """
        distance = values.double()[self._other] - self._pairs.spread(self.mean(values))
        total, squares = self._pairs.sums(self._weights), self._pairs.sums(self._weights.square())
        freedom = total - squares / total
        variance = self._pairs.sums(self._weights * distance.square()) / freedom.clamp(min=1e-300)
        return torch.where(freedom > 1e-12, variance, 0.0).sqrt()
