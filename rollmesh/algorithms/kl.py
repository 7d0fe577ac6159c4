"""The KL divergence from a reference policy, estimated from the log-probabilities of sampled tokens, and its price.

http://joschu.net/blog/kl-approx.html. All are clamped to [-10, 10], so that the gradient vanishes outside. They get
log-ratios within ±20, where all have reached that limit: the gradient of an `exp` that overflows is 0 · ∞ = NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import bounded_log_ratio

KL_LIMIT = 10.0


def k1(log_ratio: Tensor) -> Tensor:
    """``d``: unbiased, of high variance, negative where the reference is likelier."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """``d² / 2``: biased, of low variance; on-policy its gradient is that of the true divergence."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-d) - 1 + d``: unbiased, of low variance and never negative."""
    return torch.exp(-log_ratio) - 1 + log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(estimator: str, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token, [N], differentiable in ``logprobs``.

    Args:
        estimator: a key of `KL_ESTIMATORS`.
        logprobs: [N], of the policy.
        reference_logprobs: [N], of the reference, for the same tokens.
    """
    log_ratio = bounded_log_ratio(logprobs, reference_logprobs)
    return KL_ESTIMATORS[estimator](log_ratio).clamp(-KL_LIMIT, KL_LIMIT)


@dataclass(frozen=True, slots=True)
class KLController:
    """The coefficient of the penalty; kept, or moved towards a target (https://arxiv.org/abs/1909.08593, section 2.2).

    Attributes:
        coef: β now.
        target: divergence to be reached; None keeps β.
        horizon: samples over which β adapts.
    """

    coef: float
    target: float | None = None
    horizon: int = 10000

    def updated(self, divergence: float, num_samples: int) -> KLController:
        """After a batch: ``β · (1 + clip(divergence / target - 1, ±0.2) · samples / horizon)``.

        Example: β 0.1, divergence 0.09, target 0.1, 1,000 samples and horizon 10,000 give 0.1 · (1 - 0.01) = 0.099.

        Args:
            divergence: estimated for the batch, a mean.
            num_samples: in the batch.
        """
        if self.target is None:
            return self
        error = min(max(divergence / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * num_samples / self.horizon))
