"""One optimiser step on groups that are at hand; knows nothing of the mesh.

::

    groups ──► experience ──► layouts ──► micro-batches ──► loss, gradients ──► optimiser step ──► statistics
                                 │
             all ranks agree: how many generated tokens, how many passes
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rollmesh.errors import ReplayError
from rollmesh.types import Group
from services.config import MeshConfig
from services.learner.batching import MicroBatch, empty_micro_batch, pack, plan_layouts
from services.learner.engine import TrainingEngine
from services.learner.experience import build_experience
from services.learner.metrics import StepStatistics, reduce_statistics
from services.learner.objective import Objective
from services.learner.ranks import Ranks
from services.learner.schedule import learning_rate


class Trainer:
    """Trains the policy on batches of groups.

    Args:
        config: the mesh's configuration.
        engine: the policy.
        ranks: the process group.
        num_steps: optimiser steps of the whole run, for the learning rate.
    """

    def __init__(self, config: MeshConfig, engine: TrainingEngine, ranks: Ranks, num_steps: int) -> None:
        self._config = config
        self._engine = engine
        self._ranks = ranks
        self._num_steps = num_steps
        self._objective = Objective.from_config(config)

    def train(self, groups: Sequence[Group], step: int, learner_number: int) -> StepStatistics:
        """One optimiser step. Collective: every rank calls it with its own share, which may be empty.

        Args:
            groups: this rank's share of the batch.
            step: from 1.
            learner_number: number of the version the step starts from.

        Raises:
            ReplayError: the groups cannot be trained on; see `build_experience`.
        """
        started = time.monotonic()
        section, has_reference = self._config.learner, self._config.has_reference
        experience = build_experience(groups, self._objective.algorithm, has_reference)
        layouts = plan_layouts(
            [len(sequence.token_ids) for sequence in experience.sequences],
            section.tokens_per_micro_batch,
            is_single_row="flash" in section.attention,
        )
        (num_tokens,) = self._ranks.sum([experience.num_generated_tokens])
        (num_passes,) = self._ranks.max([len(layouts)])
        if num_tokens == 0:
            raise ReplayError(f"no sample of the batch of step {step} has a generated token")

        def micro_batches() -> Iterator[MicroBatch]:
            for layout in layouts:
                yield pack(experience.sequences, layout)
            for _ in range(int(num_passes) - len(layouts)):
                yield empty_micro_batch(has_reference)

        lr = learning_rate(section.optimizer, step, self._num_steps)
        token_sums, max_weight, grad_norm = self._engine.train(
            micro_batches(), int(num_passes), self._objective, num_tokens, lr
        )
        statistics = reduce_statistics(experience, token_sums, max_weight, learner_number, self._ranks)
        metrics = {
            **statistics.metrics,
            "optimizer/grad_norm": grad_norm,
            "optimizer/lr": lr,
            "time/forward_backward_s": time.monotonic() - started,
        }
        return StepStatistics(statistics.loss, metrics, statistics.staleness_histogram)
