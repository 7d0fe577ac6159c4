"""The gradients of one batch under several configurations: a program for one rank of `test_gradient_invariance`.

::

    python -m tests.integration.gradients MESH_FILE BATCHES VARIANTS OUTPUT

VARIANTS is a JSON object with a list of overrides for each name. A variant whose name ends in ``half`` gets the first
half of the batch. Rank 0 writes the gradients of the first optimiser step to OUTPUT, an array
``<variant>/<parameter>`` for each parameter. The array ``<variant>/num_passes`` has the number of passes of the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from rollmesh.replay.recording import load_recorded
from rollmesh.types import Group
from services.config import MeshConfig, load_mesh
from services.learner.batching import split_batch
from services.learner.checkpoint import Learnables
from services.learner.composition import build_trainer, load_critic_engine, load_policy
from services.learner.engine import TrainingEngine
from services.learner.process import quiet_libraries
from services.learner.ranks import Ranks, leave

LEARNER_NUMBER = 3


class Recorder:
    """A replacement of the optimiser step that records the gradients and leaves the weights as they are."""

    def __init__(self, engine: TrainingEngine, prefix: str, found: dict[str, np.ndarray]) -> None:
        self._engine = engine
        self._prefix = prefix
        self._found = found
        engine._step = self  # type: ignore[method-assign,assignment]

    def __call__(self, lr: float) -> float:
        for name, parameter in self._engine._engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None, name
            self._found.setdefault(f"{self._prefix}/{name}", gradient.detach().float().numpy().copy())
        return 0.0


def record(config: MeshConfig, ranks: Ranks, groups: list[Group], variant: str, found: dict[str, np.ndarray]) -> None:
    """Train on one batch with the learner's own parts. Add the gradients of the first optimiser step to ``found``."""
    torch.manual_seed(0)
    policy = load_policy(config, ranks)
    critic = load_critic_engine(config, ranks) if config.algorithm.needs_critic else None
    Recorder(policy, f"{variant}/policy", found)
    if critic is not None:
        Recorder(critic.engine, f"{variant}/critic", found)
    passes = 0
    train = policy.train

    def count(micro_batches, num_passes, *rest):  # type: ignore[no-untyped-def]
        nonlocal passes
        passes = num_passes
        return train(micro_batches, num_passes, *rest)

    policy.train = count  # type: ignore[method-assign]
    num_parts = config.learner.steps_per_batch
    split = split_batch([group.num_tokens for group in groups], num_parts, ranks.world_size)
    mine = [[groups[index] for index in shares[ranks.rank]] for shares in split]
    statistics = build_trainer(config, Learnables(policy, critic), ranks, 10).train(mine, 1, LEARNER_NUMBER)
    found[f"{variant}/num_passes"] = np.array(passes)
    found[f"{variant}/loss"] = np.array(statistics.loss)


def main(mesh_file: str, batch: str, variants: str, output: str) -> None:
    """Run all variants in this process."""
    quiet_libraries()
    _, groups = load_recorded(Path(batch))
    found: dict[str, np.ndarray] = {}
    ranks = None
    for name, overrides in json.loads(variants).items():
        config = load_mesh(Path(mesh_file), overrides)
        ranks = ranks or Ranks.start(config.learner)
        record(config, ranks, groups[: len(groups) // 2] if name.endswith("half") else groups, name, found)
    assert ranks is not None
    if ranks.is_first:
        np.savez(output, **found)
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
