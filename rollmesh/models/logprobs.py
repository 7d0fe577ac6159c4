"""Log-probabilities and entropies of given tokens, without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_CHUNK_ELEMENTS = 2**26
"""Logits that are held in float32 at the same time: 256 MiB."""
MIN_LOG_SOFTMAX = -200.0
"""Lower limit of the log-softmax in entropies. The exponential is 0 in float32 already below -104."""


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, max_chunk_elements: int = MAX_CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability under ``softmax(logits / temperature)``, and that distribution's entropy.

    The computation is in float32 for every dtype of the logits, in chunks of tokens. The backward pass computes the
    softmax again instead of keeping it, and computes the entropies' gradient only where the loss depends on them.

    Args:
        logits: [N, V].
        targets: int64 [N].
        temperature: greater than 0.
        max_chunk_elements: elements of ``logits`` converted at one time.

    Returns:
        Log-probabilities float32 [N] and entropies float32 [N], both differentiable.

    Example: a vocabulary of two tokens with the logits 0 and log 3 has the probabilities 1/4 and 3/4. The second token
    has the log-probability log(3/4) = -0.2877, and the entropy is -1/4 log(1/4) - 3/4 log(3/4) = 0.5623.

        >>> logits = torch.tensor([[1.0, 3.0]]).log()
        >>> token_logprobs(logits, torch.tensor([1]), temperature=1.0)
        (tensor([-0.2877]), tensor([0.5623]))
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
    """Return each target's log-probability at the target's own temperature; half the work of `token_logprobs`.

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
            # A token with the logit -inf would give 0 · (-inf) = NaN.
            entropies[part] = -(torch.exp(log_softmax) * log_softmax.clamp(min=MIN_LOG_SOFTMAX)).sum(-1)
        ctx.save_for_backward(logits, targets, normalisers, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # None instead of zeros where the loss does not depend on the entropies
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
