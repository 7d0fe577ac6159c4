"""Log-probabilities and entropies of given tokens, without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_CHUNK_ELEMENTS = 2**26
"""Logits that are in float32 at one time: 256 MiB."""


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, max_chunk_elements: int = MAX_CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(logits / temperature)``, and the entropy of that distribution.

    Computed in float32 whatever the dtype of the logits, in chunks of tokens; the backward pass computes the softmax
    again instead of keeping it.

    Args:
        logits: [N, V].
        targets: int64 [N].
        temperature: greater than 0.
        max_chunk_elements: elements of ``logits`` converted at one time.

    Returns:
        Log-probabilities float32 [N], differentiable; entropies float32 [N], without gradient.
    """
    logprobs: Tensor
    entropies: Tensor
    logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, targets, temperature, max_chunk_elements
    )
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, max_chunk_elements: int
    ) -> tuple[Tensor, Tensor]:
        num_tokens, vocabulary = logits.shape
        chunk = max(1, max_chunk_elements // vocabulary)
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
        entropies = torch.empty_like(logprobs)
        normalisers = torch.empty_like(logprobs)
        for start in range(0, num_tokens, chunk):
            part = slice(start, start + chunk)
            scaled = logits[part].float() / temperature
            normaliser = scaled.logsumexp(-1)
            normalisers[part] = normaliser
            logprobs[part] = scaled.gather(-1, targets[part, None]).squeeze(-1) - normaliser
            # exp(scaled - normaliser) * scaled is 0 · (-inf) = NaN for a token that is masked out of the vocabulary.
            finite = scaled.clamp(min=torch.finfo(torch.float32).min)
            entropies[part] = normaliser - (torch.exp(scaled - normaliser[:, None]) * finite).sum(-1)
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """d logp / d logits = (onehot(target) - softmax) / temperature."""
        logits, targets, normalisers = ctx.saved_tensors
        scaled_gradient = gradients[0] / ctx.temperature
        logits_gradient = torch.empty_like(logits)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            softmax = torch.exp(logits[part].float() / ctx.temperature - normalisers[part, None])
            gradient = softmax.mul_(-scaled_gradient[part, None])
            gradient.scatter_add_(-1, targets[part, None], scaled_gradient[part, None])
            logits_gradient[part] = gradient
        return logits_gradient, None, None, None
