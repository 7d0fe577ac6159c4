"""The clipped surrogate: of each token's ratio (PPO), or of the ratio of the whole sequence (GSPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.losses.policy_loss import Clip, PolicyLoss
from rollmesh.algorithms.ratios import sequence_ratios, token_ratios
from rollmesh.algorithms.segments import Segments


def ppo(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """Return ``-min(ρ A, clip(ρ) A)`` with ``ρ = π_θ / anchor`` of each token (https://arxiv.org/abs/1707.06347).

    Example: the ratio 1.5 with advantage 2 is clipped to 1.28, so the loss is -1.28 · 2 and has no gradient. The same
    ratio with advantage -2 is not clipped: the step back towards the anchor is allowed.

        >>> logprobs, anchor = torch.tensor([0.75, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
        >>> found = ppo(logprobs, anchor, torch.tensor([2.0, -2.0]), Segments(torch.tensor([2])), Clip(0.2, 0.28))
        >>> found.loss
        tensor([-2.5600,  3.0000])
        >>> found.is_clipped_high.tolist()
        [True, False]
    """
    return clipped_surrogate(token_ratios(logprobs, anchor), advantages, clip)


def gspo(logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Segments, clip: Clip) -> PolicyLoss:
    """Return ``-min(s A, clip(s) A)``, s being the ratio of the token's sequence (https://arxiv.org/abs/2507.18071).

    Example: tokens with the ratios 2 and 0.5 have the geometric mean 1, so neither token is clipped.

        >>> logprobs, anchor = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
        >>> gspo(logprobs, anchor, torch.tensor([2.0, 2.0]), Segments(torch.tensor([2])), Clip(0.2, 0.28)).loss
        tensor([-2., -2.])
    """
    return clipped_surrogate(tokens.spread(sequence_ratios(logprobs, anchor, tokens)), advantages, clip)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> PolicyLoss:
    """Return ``-min(ratio · A, clip(ratio) · A)``; with a dual clip at most ``-dual · A`` where A is negative.

    The dual clip is https://arxiv.org/abs/1912.09729, equation 5.

    Args:
        ratio: [N], differentiable.
        advantages: [N].
        clip: limits of the ratio.

    Example: the ratio 5 with advantage -2 costs 10. The dual clip of 3 bounds that to 6.

        >>> ratio, advantages = torch.tensor([5.0]), torch.tensor([-2.0])
        >>> clipped_surrogate(ratio, advantages, Clip()).loss.item()
        10.0
        >>> clipped_surrogate(ratio, advantages, Clip(dual=3.0)).loss.item()
        6.0
    """
    surrogate = torch.minimum(ratio * advantages, clip(ratio) * advantages)
    is_low = torch.zeros_like(advantages, dtype=torch.bool)
    is_high = torch.zeros_like(is_low)
    detached = ratio.detach()
    if clip.low is not None:
        is_low = (detached < 1.0 - clip.low) & (advantages < 0)
    if clip.high is not None:
        is_high = (detached > 1.0 + clip.high) & (advantages > 0)
    if clip.dual is not None:
        is_negative = advantages < 0
        surrogate = torch.where(is_negative, torch.maximum(surrogate, clip.dual * advantages), surrogate)
        is_high = is_high | (is_negative & (detached > clip.dual))
    return PolicyLoss(-surrogate, detached, is_low, is_high)
