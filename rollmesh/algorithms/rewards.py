"""Penalties on a sample's reward. They come before the baseline of the sample's group."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(spans: Tensor, max_tokens: int, buffer_tokens: int, penalty: float) -> Tensor:
    """Return DAPO's soft penalty on long answers (https://arxiv.org/abs/2503.14476, section 3.4).

    The penalty is 0 up to ``max_tokens - buffer_tokens`` and then grows linearly to ``penalty`` at ``max_tokens``.

    Args:
        spans: int [S], from the first to the last generated token; environment tokens in between count.
        max_tokens: tokens of the longest answer.
        buffer_tokens: at least 1, at most ``max_tokens``.
        penalty: the penalty on the longest answer.

    Returns:
        float64 [S], not positive, to be added to the reward.

    Example: at most 100 tokens, a buffer of 20, a penalty of 1. 85 tokens are 5 / 20 into the buffer.

        >>> overlong_penalty(torch.tensor([85, 90, 100]), max_tokens=100, buffer_tokens=20, penalty=1.0).tolist()
        [-0.25, -0.5, -1.0]
    """
    excess = (spans.double() - (max_tokens - buffer_tokens)).clamp(0, buffer_tokens)
    return -(excess / buffer_tokens) * penalty


def stop_properly(rewards: Tensor, is_truncated: Tensor, coef: float) -> Tensor:
    """Return the rewards with ProRL's penalty on answers that were cut at the limit of tokens, float64 [S].

    Args:
        rewards: float64 [S].
        is_truncated: bool [S].
        coef: a number from 0 to 1 multiplies the reward of a cut answer; a negative number replaces that reward.

    Example: two answers with the reward 1, of which the second was cut.

        >>> rewards, is_truncated = torch.tensor([1.0, 1.0]), torch.tensor([False, True])
        >>> stop_properly(rewards, is_truncated, coef=0.5).tolist()
        [1.0, 0.5]
        >>> stop_properly(rewards, is_truncated, coef=-1.0).tolist()
        [1.0, -1.0]
    """
    punished = coef * rewards if coef >= 0 else torch.full_like(rewards, coef)
    return torch.where(is_truncated, punished, rewards)
