"""The groups that travel in the benches of queue and stream: 8 samples of 1,280 tokens with behaviour and reference
log-probabilities, 108 KB as the codec packs them, with random contents that no layer can shorten."""

from __future__ import annotations

import numpy as np

from rollmesh.types import Group, PolicyVersion, PromptId, Sample, Score, StopReason, Turn, VersionSpan

NUM_SAMPLES = 8
PROMPT_TOKENS = 256
RESPONSE_TOKENS = 1024
VOCABULARY = 150_000


def make_sample(prompt_id: PromptId, index: int, generator: np.random.Generator) -> Sample:
    """A sample whose tokens came from two versions, as those that an update overtook."""
    half = RESPONSE_TOKENS // 2
    return Sample(
        sample_id=f"{prompt_id}/{index}/0",
        index=index,
        prompt_id=prompt_id,
        prompt_token_ids=generator.integers(0, VOCABULARY, PROMPT_TOKENS).astype(np.int32),
        response_token_ids=generator.integers(0, VOCABULARY, RESPONSE_TOKENS).astype(np.int32),
        turns=(Turn(RESPONSE_TOKENS, 0, StopReason.STOP),),
        behaviour_logprobs=-generator.random(RESPONSE_TOKENS, dtype=np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, 1), 0, half), VersionSpan(PolicyVersion(0, 2), half, half)),
        score=Score(1.0, 1.0),
        reference_logprobs=-generator.random(RESPONSE_TOKENS, dtype=np.float32),
    )


def make_group(prompt_id: PromptId, sequence: int, generator: np.random.Generator) -> Group:
    samples = tuple(make_sample(prompt_id, index, generator) for index in range(NUM_SAMPLES))
    return Group(str(prompt_id), prompt_id, sequence, 1, samples)
