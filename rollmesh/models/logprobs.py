"""Log-probabilities and entropies of given tokens, without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_CHUNK_ELEMENTS = 2**26
"""Logits that are in float32 at one time: 256 MiB."""
MIN_LOG_SOFTMAX = -200.0
"""Below -104 the exponential is 0 in float32."""


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, max_chunk_elements: int = MAX_CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(logits / temperature)``, and the entropy of that distribution.

    Computed in float32 whatever the dtype of the logits, in chunks of tokens; the backward pass computes the softmax
    again instead of keeping it, and the entropy's part of the gradient only where something asks for it.

    Args:
        logits: [N, V].
        targets: int64 [N].
        temperature: greater than 0.
        max_chunk_elements: elements of ``logits`` converted at one time.

    Returns:
        Log-probabilities float32 [N] and entropies float32 [N], both differentiable.
    """
    logprobs: Tensor
    entropies: Tensor
    logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, targets, temperature, max_chunk_elements
    )
    return logprobs, entropies


def target_logprobs(
    logits: Tensor, targets: Tensor, temperatures: Tensor, max_chunk_elements: int = MAX_CHUNK_ELEMENTS
) -> Tensor:
    """Log-probabilities alone, each at a temperature of its own: half the work where nothing is trained.

    Args:
        logits: [N, V].
        targets: int64 [N].
        temperatures: float32 [N], greater than 0.
        max_chunk_elements: elements of ``logits`` converted at one time.

    Returns:
        float32 [N].
    """
    parts = []
    chunk = max(1, max_chunk_elements // logits.shape[1])
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        scaled = logits[rows].float() / temperatures[rows, None]
        parts.append(scaled.gather(1, targets[rows, None]).squeeze(1) - scaled.logsumexp(1))
    return torch.cat(parts) if parts else temperatures.new_zeros(0)


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
            log_softmax = scaled - normaliser[:, None]
            # A token that is masked out of the vocabulary would give 0 · (-inf) = NaN.
            entropies[part] = -(torch.exp(log_softmax) * log_softmax.clamp(min=MIN_LOG_SOFTMAX)).sum(-1)
        ctx.save_for_backward(logits, targets, normalisers, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # None instead of zeros where nothing depends on the entropies
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        """With p the softmax of ``logits / temperature`` and H its entropy:

        d logp / d logits = (onehot(target) - p) / temperature, and d H / d logits = -p (log p + H) / temperature.
        """
        logits, targets, normalisers, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = (None if g is None else g / ctx.temperature for g in gradients)
        logits_gradient = torch.empty_like(logits)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_softmax = logits[part].float() / ctx.temperature - normalisers[part, None]
            gradient = torch.exp(log_softmax)
            if of_entropies is None:
                assert of_logprobs is not None
                gradient *= -of_logprobs[part, None]
            else:
                # As in the forward pass: 0 · (-inf) would be NaN.
                slope = log_softmax.clamp_(min=MIN_LOG_SOFTMAX).add_(entropies[part, None])
                slope *= of_entropies[part, None]
                if of_logprobs is not None:
                    slope += of_logprobs[part, None]
                gradient *= slope.neg_()
            if of_logprobs is not None:
                gradient.scatter_add_(-1, targets[part, None], of_logprobs[part, None])
            logits_gradient[part] = gradient
        return logits_gradient, None, None, None
