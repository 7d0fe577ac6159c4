"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from services.learner.config import OptimizerSection


def learning_rate(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Learning rate of one optimiser step.

    Grows linearly over ``warmup_steps`` and reaches ``lr`` at the last of them; then falls along the schedule and
    reaches ``min_lr_ratio × lr`` at ``num_steps``.

    Args:
        section: the optimiser's settings.
        step: from 1.
        num_steps: optimiser steps of the whole run.
    """
    if step <= section.warmup_steps:
        return section.lr * step / section.warmup_steps
    if section.schedule == "constant":
        return section.lr
    first = max(1, section.warmup_steps)
    progress = min(1.0, (step - first) / max(1, num_steps - first))
    remaining = 1.0 - progress if section.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.lr * (section.min_lr_ratio + (1.0 - section.min_lr_ratio) * remaining)
