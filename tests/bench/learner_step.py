"""One optimiser step of the learner against a plain torch loop on the same micro-batches.

The plain loop does what a step cannot do without: forward, the clipped surrogate, backward, the gradient's norm, AdamW.
It gets its micro-batches ready made. Ours begins with groups: advantages, packing, statistics and DeepSpeed are in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rollmesh.algorithms.pipeline import estimate_advantages
from rollmesh.models.loading import load_causal_lm
from rollmesh.types import Group
from services.config import MeshConfig
from services.learner.batching import MicroBatch, TokenColumns, pack, plan_layouts
from services.learner.checkpoint import Learnables
from services.learner.composition import build_trainer, load_policy
from services.learner.experience import build_experience
from services.learner.ranks import Ranks
from tests.bench.figures import Figure, median, paired, timed
from tests.bench.model import write_model
from tests.unit.learner.samples import mesh_config, random_groups
from tests.unit.models.sources import source_of

LR = 1e-6


def run(quick: bool) -> list[Figure]:
    """Seconds per step, in turns, single-threaded."""
    num_pairs = 5 if quick else 15
    with tempfile.TemporaryDirectory(prefix="bench-learner-") as folder:
        config = _config(write_model(Path(folder) / "model"), Path(folder))
        groups = random_groups(32, 8, lengths=(8, 64))
        ranks = Ranks.start(config.learner)
        trainer = build_trainer(config, Learnables(load_policy(config, ranks)), ranks, 10**6)
        bare = _BareLoop(config, _micro_batches(config, groups))
        steps = iter(range(1, 10**6))
        for work in (bare.step, lambda: trainer.train([groups], next(steps), 0)):
            work()
        pairs = paired(
            num_pairs, lambda: timed(bare.step), lambda: timed(lambda: trainer.train([groups], next(steps), 0))
        )
        ranks.stop()
    return [
        Figure(
            "learner_step",
            "time of a plain torch step / of the learner's step (one rank, float32)",
            0.95,
            "at least",
            [theirs / ours for theirs, ours in pairs],
            {
                "torch_step_s": median([theirs for theirs, _ in pairs]),
                "learner_step_s": median([ours for _, ours in pairs]),
                "num_tokens": sum(group.num_tokens for group in groups),
                "num_micro_batches": len(bare.batches),
                "num_parameters": sum(p.numel() for p in bare.model.parameters()),
            },
        )
    ]


def _config(model: Path, folder: Path) -> MeshConfig:
    optimizer = {"lr": LR, "max_grad_norm": 1.0}
    learner = {"dtype": "float32", "device": "cpu", "tokens_per_micro_batch": 4096, "optimizer": optimizer}
    training = {"steps": 10**6, "prompts_per_step": 32, "samples_per_prompt": 8, "max_staleness": 1}
    return mesh_config(model, folder, training=training, learner=learner)


def _micro_batches(config: MeshConfig, groups: Sequence[Group]) -> list[MicroBatch]:
    experience = build_experience([groups], needs_reference=False)
    batch = experience.trajectories
    advantages = estimate_advantages(batch, batch.rewards, config.algorithm.advantage, None).advantages
    columns = TokenColumns(
        experience.behaviour, advantages, torch.zeros_like(advantages).double(), experience.version_numbers
    )
    sequences = experience.sequences
    layouts = plan_layouts([len(s.token_ids) for s in sequences], config.learner.tokens_per_micro_batch)
    return [pack(sequences, experience.sequence_starts, layout, columns) for layout in layouts]


class _BareLoop:
    """What one would write without a framework; logits only where a token is predicted, as the learner does."""

    def __init__(self, config: MeshConfig, batches: list[MicroBatch]) -> None:
        section = config.learner.optimizer
        self.batches = batches
        self.model = load_causal_lm(source_of(config.model.path))
        self.model.train()
        self._clip = config.algorithm.loss
        self._max_grad_norm = section.max_grad_norm
        self._denominator = sum(len(batch.targets) for batch in batches)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=section.betas, eps=section.eps, weight_decay=0.0, fused=True
        )

    def step(self) -> float:
        """Returns the loss."""
        total = 0.0
        for batch in self.batches:
            loss = self._loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[batch.predictors])
        logprobs = torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None]).squeeze(-1)
        ratio = torch.exp(logprobs - batch.columns.behaviour)
        clipped = ratio.clamp(1.0 - (self._clip.clip_low or 0.0), 1.0 + (self._clip.clip_high or 0.0))
        losses = -torch.minimum(ratio * batch.columns.advantages, clipped * batch.columns.advantages)
        return losses.sum() / self._denominator
