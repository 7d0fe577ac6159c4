"""Log-probs of given tokens by the Hugging Face model: what an engine's own must agree with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from rollmesh.types import PolicyVersion, VersionSpan


@torch.no_grad()
def logprobs_of_one_version(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """float32 [G] at temperature 1, everything computed with one set of weights."""
    ids = torch.tensor([[*prompt, *tokens]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return _pick(logits, tokens)


@torch.no_grad()
def logprobs_across_versions(
    models: Mapping[PolicyVersion, PreTrainedModel],
    prompt: Sequence[int],
    tokens: Sequence[int],
    spans: Sequence[VersionSpan],
) -> torch.Tensor:
    """float32 [G] as an engine computes them that keeps its KV cache when its weights change.

    The token at index i comes out of the forward pass that reads the one before it, so that pass ran with the version
    of token i, upon keys and values that older versions left behind; the prompt was read with that of token 0.
    """
    cache = DynamicCache()
    inputs = [*prompt, *tokens[:-1]]
    parts = []
    start = 0
    for span in spans:
        stop = len(prompt) + span.start + span.length - 1
        logits = models[span.version](torch.tensor([inputs[start:stop]]), past_key_values=cache, use_cache=True).logits
        parts.append(logits[0, -span.length :])
        start = stop
    return _pick(torch.cat(parts), tokens)


def _pick(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(list(tokens))[:, None])[:, 0]
