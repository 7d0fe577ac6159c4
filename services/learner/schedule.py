"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.learner.config import OptimizerSection


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rates of one model over a run.

    Attributes:
        section: the optimiser's settings.
        updates_per_batch: optimiser steps on each batch.
        num_batches: batches of the whole run.
        num_frozen: number of batches at the start in which the model is not trained. The schedule begins after them.
    """

    section: OptimizerSection
    updates_per_batch: int
    num_batches: int
    num_frozen: int = 0

    def rate(self, batch: int, update: int) -> float:
        """Return the learning rate of one optimiser step; 0 while the model is frozen.

        With 2 updates a batch and 1 frozen batch, update 0 of batch 3 is the model's optimiser step 3.

        Args:
            batch: number of the batch, from 1.
            update: number of the optimiser step on this batch, from 0.
        """
        if batch <= self.num_frozen:
            return 0.0
        step = (batch - 1 - self.num_frozen) * self.updates_per_batch + update + 1
        return learning_rate(self.section, step, (self.num_batches - self.num_frozen) * self.updates_per_batch)


def learning_rate(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Return the learning rate of one optimiser step.

    The rate grows linearly over ``warmup_steps`` and reaches ``lr`` at the last of these steps. Then the rate falls
    along the schedule and reaches ``min_lr_ratio × lr`` at ``num_steps``. The schedule `constant` keeps ``lr``.

    Args:
        section: the optimiser's settings.
        step: number of the optimiser step, from 1.
        num_steps: optimiser steps of the whole run.

    Example: 12 steps, of which 2 are warm-up. At step 7 half of the other 10 steps are done: 0.1 + 0.9 · 0.5 = 0.55.

        >>> linear = OptimizerSection(lr=1.0, warmup_steps=2, schedule="linear", min_lr_ratio=0.1)
        >>> [learning_rate(linear, step, num_steps=12) for step in (1, 2, 7, 12)]
        [0.5, 1.0, 0.55, 0.1]
    """
    if step <= section.warmup_steps:
        return section.lr * step / section.warmup_steps
    if section.schedule == "constant":
        return section.lr
    first = max(1, section.warmup_steps)
    progress = min(1.0, (step - first) / max(1, num_steps - first))
    remaining = 1.0 - progress if section.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.lr * (section.min_lr_ratio + (1.0 - section.min_lr_ratio) * remaining)
