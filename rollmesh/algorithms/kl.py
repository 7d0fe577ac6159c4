"""Estimators of the KL divergence from a reference policy, from the log-probabilities of sampled tokens.

http://joschu.net/blog/kl-approx.html. All are clamped to [-10, 10], so that the gradient vanishes outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    return KL_ESTIMATORS[estimator](logprobs - reference_logprobs).clamp(-KL_LIMIT, KL_LIMIT)
