"""Training on recorded batches without a mesh, to study a step or to compare numbers of ranks and ZeRO stages.

::

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m services.learner.retrain \\
        --config runs/x/mesh.yaml --batches runs/x/batches --output losses.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rollmesh.errors import ConfigError
from services.config import load_mesh
from services.learner.batching import split_batch
from services.learner.composition import build_trainer, load_learnables
from services.learner.ranks import Ranks, leave
from services.learner.recording import load_recorded
from services.learner.trainer import Trainer


def retrain(
    trainer: Trainer, ranks: Ranks, steps_per_batch: int, batch_files: Sequence[Path], steps: int
) -> list[float]:
    """Train on recorded batches, and return the losses. Collective.

    Args:
        trainer: the trainer, with the models to train.
        ranks: the process group.
        steps_per_batch: optimiser steps in one pass over a batch.
        batch_files: recorded batches, in order. With fewer files than ``steps``, the first follows the last again.
        steps: number of batches to train on.

    Returns:
        The loss of each step, computed before the step.

    Raises:
        ConfigError: a file is not a recorded batch.
    """
    losses = []
    for step in range(1, steps + 1):
        groups = load_recorded(batch_files[(step - 1) % len(batch_files)])
        split = split_batch([group.num_tokens for group in groups], steps_per_batch, ranks.world_size)
        mine = [[groups[index] for index in shares[ranks.rank]] for shares in split]
        losses.append(trainer.train(mine, step, step - 1).loss)
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the batches that the command line names. Rank 0 writes the losses as a JSON list."""
    parser = argparse.ArgumentParser(description="Train on recorded batches.")
    parser.add_argument("--config", type=Path, required=True, help="mesh file")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=Path, required=True, help="folder with recorded batches")
    parser.add_argument("--steps", type=int, help="batches to train on; all that were recorded by default")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the losses")
    args = parser.parse_args(arguments)
    batches = sorted(args.batches.glob("step-*.msgpack"))
    if not batches:
        raise ConfigError("--batches", f"{str(args.batches)!r} holds no recorded batches", "name a run's batches/")
    config = load_mesh(args.config, args.overrides)
    ranks, steps = Ranks.start(config.learner), args.steps or len(batches)
    trainer = build_trainer(config, load_learnables(config, ranks), ranks, steps)
    losses = retrain(trainer, ranks, config.learner.steps_per_batch, batches, steps)
    if ranks.is_first:
        args.output.write_text(json.dumps(losses), encoding="utf-8")
    ranks.stop()


if __name__ == "__main__":
    main()
    leave(0)
