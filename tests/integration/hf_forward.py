"""Log-probabilities of given tokens from the Hugging Face model, with which an engine has to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from rollmesh.types import PolicyVersion, VersionSpan


@torch.no_grad()
def logprobs_of_one_version(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of the G tokens at temperature 1, float32 [G], with one set of weights."""
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
    """Return the log-probabilities of an engine that keeps its KV cache when its weights change, float32 [G].

    The forward pass that reads the token before token i gives token i, so this pass has the version of token i. The
    pass uses keys and values that older versions left behind. The pass over the prompt has the version of token 0.
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
