"""Penalties on a sample's reward, before its group is looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(spans: Tensor, max_tokens: int, buffer_tokens: int, penalty: float) -> Tensor:
    """DAPO's soft punishment of long answers (https://arxiv.org/abs/2503.14476, section 3.4).

    Nothing up to ``max_tokens - buffer_tokens``, then growing linearly to ``penalty`` at ``max_tokens``.

    Args:
        spans: int [S], from the first to the last generated token; environment tokens in between count.
        max_tokens: longest answer.
        buffer_tokens: at least 1, at most ``max_tokens``.
        penalty: of the longest answer.

    Returns:
        float64 [S], not positive, to be added to the reward.
    """
    excess = (spans.double() - (max_tokens - buffer_tokens)).clamp(0, buffer_tokens)
    return -(excess / buffer_tokens) * penalty


def stop_properly(rewards: Tensor, is_truncated: Tensor, coef: float) -> Tensor:
    """ProRL's penalty on answers that were cut at the limit.

    Args:
        rewards: float64 [S].
        is_truncated: bool [S].
        coef: 0 to 1 multiplies the reward of a cut answer; a negative number replaces it.
    """
    punished = coef * rewards if coef >= 0 else torch.full_like(rewards, coef)
    return torch.where(is_truncated, punished, rewards)
