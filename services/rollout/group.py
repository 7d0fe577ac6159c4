"""One lease: its samples run side by side, each is scored as it ends, and the group waits for the last.

::

    lease ──► render ──┬── episode 0 ──► score ──┐
                       ├── episode 1 ──► score ──┼──► samples in order of index, without the invalid ones
                       └── episode n ──► score ──┘

Nothing in a group waits for another group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rollmesh.data.render import PromptRenderer, RenderedPrompt, Tokenizer
from rollmesh.errors import RollMeshError
from rollmesh.types import Int32Array, InvalidSample, Lease, LeaseKind, Sample, StopReason
from rollmesh.wire.outcome import ScoreCall
from services.rollout.engine import Engine
from services.rollout.episode import run_episode
from services.rollout.scoring import Scorer

MIN_SAMPLES = {LeaseKind.TRAIN: 2, LeaseKind.EVALUATE: 1}
"""The number of valid samples that a group needs. Training compares the samples of a group with each other, so two
samples have to be valid. An evaluation averages the valid samples. A group that has fewer samples than this needs all
of them."""


class TooFewSamplesError(RollMeshError):
    """Too few samples of the group are valid, and another try would not help."""


class GenerationCutShortError(RollMeshError):
    """The engine gave up a sample before the sample was complete."""


@dataclass
class GenerationCounts:
    """Counts of the worker's samples, tokens and groups, for the heartbeats and the status call."""

    num_samples_generating: int = 0
    num_generated_tokens: int = 0
    num_samples_scored: int = 0
    num_groups_committed: int = 0


class GroupRunner:
    """Produces groups. Keeps no state between two groups.

    Args:
        engine: generates the samples.
        scorer: scores the samples.
        renderers: one renderer for each kind of lease, because held-out prompts may have settings of their own.
        tokenizer: decodes the text that the reward server reads.
        has_reference: whether training groups need the reference's log-probabilities.
        counts: the runner counts its samples and tokens here.
    """

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        renderers: Mapping[LeaseKind, PromptRenderer],
        tokenizer: Tokenizer,
        *,
        has_reference: bool,
        counts: GenerationCounts,
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._renderers = renderers
        self._tokenizer = tokenizer
        self._has_reference = has_reference
        self._counts = counts

    async def run(self, lease: Lease) -> tuple[Sample, ...]:
        """Generate and score the samples of one group. The first sample that fails cancels the others.

        Returns:
            The valid samples, in the order of their indices.

        Raises:
            InvalidArgumentError: the prompt cannot be rendered, or the engine can never accept the prompt.
            ConfigError: the data section does not fit the prompt.
            ScoringFailedError: a sample got no score.
            GenerationCutShortError: the engine gave up a sample.
            TooFewSamplesError: too few samples are valid.
        """
        prompt = self._renderers[lease.kind].render(lease.prompt_json, str(lease.prompt_id))
        column = np.asarray(prompt.token_ids, dtype=np.int32)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._run_sample(lease, index, prompt, column))
                    for index in range(lease.num_samples)
                ]
        except BaseExceptionGroup as failures:
            # The first failure is the cause: the later ones happened while the other samples were being cancelled.
            raise failures.exceptions[0] from None
        return _valid(lease, [task.result() for task in running])

    async def _run_sample(
        self, lease: Lease, index: int, prompt: RenderedPrompt, column: Int32Array
    ) -> Sample | InvalidSample:
        counts = self._counts
        counts.num_samples_generating += 1
        try:
            sample = await run_episode(self._engine, lease, index, prompt.token_ids, column)
        finally:
            counts.num_samples_generating -= 1
        counts.num_generated_tokens += sample.num_generated_tokens
        if sample.stop_reason is StopReason.ABORTED or sample.num_generated_tokens == 0:
            raise GenerationCutShortError(f"generation of sample {sample.sample_id} was cut short")
        tokens = prompt.token_ids + sample.response_token_ids.tolist()
        call = ScoreCall(
            sample=sample,
            prompt_text=prompt.text,
            query_text=self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            label_json=lease.label_json,
            datasource=lease.datasource,
        )
        wants_reference = self._has_reference and lease.kind is LeaseKind.TRAIN
        scored = await self._scorer.score(call, lease.sampling.temperature if wants_reference else None)
        counts.num_samples_scored += 1
        return scored


def _valid(lease: Lease, outcomes: list[Sample | InvalidSample]) -> tuple[Sample, ...]:
    samples = tuple(outcome for outcome in outcomes if isinstance(outcome, Sample))
    if len(samples) < min(MIN_SAMPLES[lease.kind], lease.num_samples):
        reason = next(outcome.reason for outcome in outcomes if isinstance(outcome, InvalidSample))
        raise TooFewSamplesError(f"{len(samples)} of {len(outcomes)} samples are valid ({reason})")
    return samples
