"""Translates one generation request and its result between the mesh and vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh.types import Float32Array, Int32Array, PolicyVersion, SamplingSpec, StopReason, VersionSpan

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_STOP_REASONS = {"stop": StopReason.STOP, "length": StopReason.LENGTH}


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that the engine generated for one prompt.

    Attributes:
        token_ids: int32 [G]; the end-of-sequence token is included where the engine sampled that token.
        logprobs: float32 [G], the log-probabilities that the engine sampled with, after temperature and truncation.
        version_spans: the policy versions of the tokens; the spans cover the G tokens in order.
        stop_reason: STOP, LENGTH, or ABORTED where vLLM gave up the request.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    version_spans: tuple[VersionSpan, ...]
    stop_reason: StopReason


def sampling_params(sampling: SamplingSpec, seed: int, room: int) -> SamplingParams:
    """Return vLLM's parameters for one sample of at most ``room`` tokens.

    The parameters ask for no text, and for the log-probability of the sampled token alone, because everything else
    would cost time on the hot path.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=min(sampling.max_new_tokens, room),
        seed=seed or None,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def read_completion(output: Any) -> Completion:
    """Return the completion that vLLM's `CompletionOutput` describes. Its log-probs are those of the sampled tokens."""
    spans: list[VersionSpan] = []
    for span in output.weight_versions or ():
        version = PolicyVersion.parse(span.version)
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].start, span.end - spans[-1].start)
        elif span.end > span.start:
            spans.append(VersionSpan(version, span.start, span.end - span.start))
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),
        version_spans=tuple(spans),
        stop_reason=_STOP_REASONS.get(output.finish_reason, StopReason.ABORTED),
    )
