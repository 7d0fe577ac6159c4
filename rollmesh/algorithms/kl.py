"""Estimators of the KL divergence from a reference policy, and the coefficient of the penalty on that divergence.

The estimators are those of http://joschu.net/blog/kl-approx.html; d is a sampled token's log-ratio
``log policy - log reference``. `kl_estimate` clamps d to ±20 and the estimate to ±10, so that the gradient is 0
outside. Without the first clamp ``exp`` could overflow, and its gradient would be 0 · ∞ = NaN. At ±20 every estimate
has passed its own limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollmesh.algorithms.ratios import bounded_log_ratio

KL_LIMIT = 10.0


def k1(log_ratio: Tensor) -> Tensor:
    """Return ``d``: unbiased, of high variance, negative where the reference gives the token more probability.

    >>> k1(torch.tensor([0.5, -0.5])).tolist()
    [0.5, -0.5]
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return ``d² / 2``: biased, of low variance; on policy its expected gradient is that of the true divergence.

    >>> k2(torch.tensor([0.5, -0.5])).tolist()
    [0.125, 0.125]
    """
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Return ``exp(-d) - 1 + d``: unbiased, of low variance, never negative.

    >>> k3(torch.tensor([0.5, -0.5]))
    tensor([0.1065, 0.1487])
    """
    return torch.exp(-log_ratio) - 1 + log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(estimator: str, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return an estimate of KL(policy || reference) per token, [N], differentiable in ``logprobs``.

    Args:
        estimator: a key of `KL_ESTIMATORS`.
        logprobs: [N], of the policy.
        reference_logprobs: [N], of the reference, for the same tokens.

    Example: the log-ratio 0.5 gives 0.1065; the log-ratio -5 gives exp(5) - 6 = 142.4, clamped to 10.

        >>> kl_estimate("k3", torch.tensor([-1.0, -6.0]), torch.tensor([-1.5, -1.0]))
        tensor([ 0.1065, 10.0000])
    """
    log_ratio = bounded_log_ratio(logprobs, reference_logprobs)
    return KL_ESTIMATORS[estimator](log_ratio).clamp(-KL_LIMIT, KL_LIMIT)


@dataclass(frozen=True, slots=True)
class KLController:
    """The coefficient β of the penalty: fixed, or adapting to a target (https://arxiv.org/abs/1909.08593, section 2.2).

    Attributes:
        coef: the present β.
        target: the divergence that β steers towards; None keeps β.
        horizon: samples over which β adapts.
    """

    coef: float
    target: float | None = None
    horizon: int = 10000

    def updated(self, divergence: float, num_samples: int) -> KLController:
        """Return the controller with the new β, ``β · (1 + clip(divergence / target - 1, ±0.2) · n / horizon)``.

        Args:
            divergence: the batch's mean estimated divergence.
            num_samples: n, the samples in the batch.

        Example: 0.1 · (1 - 0.1 · 1,000 / 10,000) = 0.099.

            >>> round(KLController(coef=0.1, target=0.1, horizon=10000).updated(0.09, num_samples=1000).coef, 6)
            0.099
        """
        if self.target is None:
            return self
        error = min(max(divergence / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * num_samples / self.horizon))
