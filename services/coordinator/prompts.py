"""The prompts of the run, and the leases that carry them.

The group's place in the line, the dataset and the configuration decide what a lease carries. Therefore the coordinator
keeps no copy of a lease.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from rollmesh.config.shared import DataSection, EvaluationSection, SamplingSection, TrainingSection
from rollmesh.data.datasets import PromptDataset
from rollmesh.data.order import PromptOrder
from rollmesh.replay.rows import GroupRow
from rollmesh.types import Lease, LeaseKind, PromptId, SamplingSpec

TRAIN, EVAL = "train", "eval"
_SEED_BITS = 48


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The prompts of the evaluation rounds, and the settings of the rounds."""

    dataset: PromptDataset
    section: EvaluationSection


class PromptBook:
    """Gives the prompt for each place in the line, and the lease for each row of the ledger.

    Args:
        dataset: the prompts to train on.
        data: says whether the dataset is shuffled.
        training: has the number of epochs, and of samples per prompt.
        sampling: how training samples are drawn.
        seed: of the run.
        held_out: None where the run has no evaluation.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        data: DataSection,
        training: TrainingSection,
        sampling: SamplingSection,
        seed: int,
        held_out: HeldOut | None,
    ) -> None:
        self._dataset = dataset
        self._samples_per_prompt = training.samples_per_prompt
        self._sampling = sampling
        self._seed = seed
        self._held_out = held_out
        self._order = PromptOrder(TRAIN, len(dataset), training.epochs, seed, data.shuffle)

    def __len__(self) -> int:
        """Return the number of prompts that the run may use, over all epochs."""
        return len(self._order)

    def next_prompts(self, num_opened: int, count: int) -> list[PromptId]:
        """Return the ``count`` prompts (fewer at the end of the line) after the first ``num_opened`` prompts."""
        return self._order.slice(num_opened, num_opened + count)

    def train_lease(self, row: GroupRow, ttl_s: float) -> Lease:
        """Return the lease of a group.

        Raises:
            ConfigError: the dataset's row cannot be used.
        """
        sampling = self._sampling
        spec = SamplingSpec(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            seed=_seed_of(self._seed, row.prompt_id) if sampling.is_seeded else 0,
        )
        prompt = self._dataset.row(row.prompt_id.index)
        return Lease(
            group_id=row.group_id,
            fencing_token=row.fencing_token,
            kind=LeaseKind.TRAIN,
            prompt_id=row.prompt_id,
            sequence=row.sequence,
            attempt=row.attempt,
            num_samples=self._samples_per_prompt,
            prompt_json=prompt.prompt_json,
            label_json=prompt.label_json,
            datasource=prompt.datasource,
            sampling=spec,
            ttl_s=ttl_s,
        )

    def evaluation_lease(self, prompt_id: PromptId, fencing_token: int, attempt: int, ttl_s: float) -> Lease:
        """Return the lease of a held-out prompt.

        Raises:
            ConfigError: the dataset's row cannot be used.
        """
        assert self._held_out is not None, "evaluation leases need held-out prompts"
        section, sampling = self._held_out.section, self._sampling
        # A prompt has the same seed in all rounds, so that two rounds differ by the policy alone.
        same_prompt = PromptId(EVAL, 0, prompt_id.index)
        spec = SamplingSpec(
            temperature=section.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=section.max_new_tokens or sampling.max_new_tokens,
            seed=_seed_of(self._seed, same_prompt) if sampling.is_seeded else 0,
        )
        prompt = self._held_out.dataset.row(prompt_id.index)
        return Lease(
            group_id=str(prompt_id),
            fencing_token=fencing_token,
            kind=LeaseKind.EVALUATE,
            prompt_id=prompt_id,
            sequence=prompt_id.index,
            attempt=attempt,
            num_samples=section.samples_per_prompt,
            prompt_json=prompt.prompt_json,
            label_json=prompt.label_json,
            datasource=prompt.datasource,
            sampling=spec,
            ttl_s=ttl_s,
        )


def _seed_of(run_seed: int, prompt_id: PromptId) -> int:
    """Return a seed in [1, 2**48] for one prompt.

    The seed plus the index of a sample stays far below 2**64. 0 would tell the engine to choose a seed.
    """
    digest = hashlib.blake2b(f"{run_seed}:{prompt_id}".encode(), digest_size=_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little") + 1
