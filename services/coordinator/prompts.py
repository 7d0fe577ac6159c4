"""The prompts of the run, and the leases that carry them.

A lease's content is a function of the group's place in the line, the dataset and the configuration; the coordinator
keeps no copy of it.
"""

from __future__ import annotations

import hashlib

from rollmesh.data.datasets import PromptDataset
from rollmesh.data.order import PromptOrder
from rollmesh.replay.rows import GroupRow
from rollmesh.types import Lease, LeaseKind, PromptId, SamplingSpec
from services.config import MeshConfig

TRAIN, EVAL = "train", "eval"
_SEED_BITS = 48


class PromptBook:
    """Turns places in the line into prompt ids, and rows of the ledger into leases."""

    def __init__(self, config: MeshConfig, train: PromptDataset, evaluation: PromptDataset | None) -> None:
        self._config = config
        self._train = train
        self._evaluation = evaluation
        self._order = PromptOrder(TRAIN, len(train), config.training.epochs, config.run.seed, config.data.shuffle)

    def __len__(self) -> int:
        """Prompts that the run may use."""
        return len(self._order)

    @property
    def num_evaluation_prompts(self) -> int:
        return 0 if self._evaluation is None else len(self._evaluation)

    def next_prompts(self, num_opened: int, count: int) -> list[PromptId]:
        """The ``count`` prompts (fewer at the end) that follow the ``num_opened`` groups in the ledger."""
        return self._order.slice(num_opened, num_opened + count)

    def train_lease(self, row: GroupRow, ttl_s: float) -> Lease:
        """Raises ConfigError if the dataset's row cannot be used."""
        sampling = self._config.sampling
        spec = SamplingSpec(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            seed=_seed(self._config.run.seed, row.prompt_id) if sampling.is_seeded else 0,
        )
        prompt = self._train.row(row.prompt_id.index)
        return Lease(
            group_id=row.group_id,
            fencing_token=row.fencing_token,
            kind=LeaseKind.TRAIN,
            prompt_id=row.prompt_id,
            sequence=row.sequence,
            attempt=row.attempt,
            num_samples=self._config.training.samples_per_prompt,
            prompt_json=prompt.prompt_json,
            label_json=prompt.label_json,
            datasource=prompt.datasource,
            sampling=spec,
            ttl_s=ttl_s,
        )

    def evaluation_lease(self, prompt_id: PromptId, fencing_token: int, attempt: int, ttl_s: float) -> Lease:
        """Raises ConfigError if the dataset's row cannot be used."""
        section = self._config.evaluation
        assert section is not None, "evaluation leases need an evaluation section"
        assert self._evaluation is not None, "evaluation leases need an evaluation dataset"
        # One seed per prompt for all rounds: what changes between two rounds is the policy.
        same_prompt = PromptId(EVAL, 0, prompt_id.index)
        spec = SamplingSpec(
            temperature=section.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=section.max_new_tokens or self._config.sampling.max_new_tokens,
            seed=_seed(self._config.run.seed, same_prompt) if self._config.sampling.is_seeded else 0,
        )
        prompt = self._evaluation.row(prompt_id.index)
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


def _seed(run_seed: int, prompt_id: PromptId) -> int:
    """A seed in [1, 2**48], so that seed + sample index stays far below 2**64; 0 would mean the engine's own."""
    digest = hashlib.blake2b(f"{run_seed}:{prompt_id}".encode(), digest_size=_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little") + 1
