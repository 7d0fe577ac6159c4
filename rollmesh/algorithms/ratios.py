"""Ratios of the probabilities that two policies give to the same tokens, bounded so that ``exp`` cannot overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.segments import Segments

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this distance from 0: the ``exp`` of a larger one only overflows."""


def bounded_log_ratio(policy: Tensor, anchor: Tensor) -> Tensor:
    """Return ``log policy - log anchor`` clamped to ±20, [N]; 0 without gradient where both are -∞.

    Args:
        policy: [N], log-probabilities; may be differentiable.
        anchor: [N], log-probabilities of the same tokens under the other policy.

    Example: a token that only the anchor forbids gets 20; a token that both policies forbid gets 0.

        >>> policy = torch.tensor([-1.0, -1.0, -torch.inf])
        >>> bounded_log_ratio(policy, torch.tensor([-1.5, -torch.inf, -torch.inf])).tolist()
        [0.5, 20.0, 0.0]
    """
    both_forbid = torch.isneginf(policy) & torch.isneginf(anchor)
    difference = policy.masked_fill(both_forbid, 0.0) - anchor.masked_fill(both_forbid, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratios(policy: Tensor, anchor: Tensor) -> Tensor:
    """Return ``policy / anchor`` of each token, [N], from log-probabilities [N]; between exp(-20) and exp(20).

    Example: exp(-1 + 1.5) = exp(0.5).

        >>> token_ratios(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([1.6487])
    """
    return torch.exp(bounded_log_ratio(policy, anchor))


def sequence_ratios(policy: Tensor, anchor: Tensor, tokens: Segments) -> Tensor:
    """Return the geometric mean of the ratios of each sequence's tokens, [S]; 1 for a sequence without tokens.

    A longer sequence has no larger ratio. Only the mean log-ratio is clamped to ±20, and the log-ratios of single
    tokens are not: log-ratios of -60 and 20 have the mean -20, and so the ratio exp(-20).

    Args:
        policy: [N], log-probabilities; may be differentiable.
        anchor: [N], log-probabilities of the same tokens under the other policy.
        tokens: the generated tokens of each sequence.

    Example: the log-ratios 0.5 and -0.1 have the mean 0.2, and exp(0.2) = 1.2214.

        >>> policy, anchor = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.9])
        >>> sequence_ratios(policy, anchor, Segments(torch.tensor([2])))
        tensor([1.2214])
    """
    return torch.exp(tokens.means(policy - anchor).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
