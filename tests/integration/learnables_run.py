"""A run of PPO with a critic and an average of the policy on made-up batches, on every rank that torch starts.

::

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.integration.learnables_run \\
        --model MODEL --folder FOLDER --stages 0 2 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rollmesh.types import PolicyVersion
from services.config import MeshConfig
from services.learner.batching import split_batch
from services.learner.composition import build_checkpoint_store, build_trainer, load_learnables
from services.learner.engine import PolicyEngine
from services.learner.ranks import Ranks, leave
from services.learner.trainer import Trainer
from tests.unit.learner.samples import mesh_config, random_groups

NUM_STEPS = 4
SAVED_STEP = 2
BETA = 0.8
METRICS = ("value/loss", "value/mean", "value/grad_norm", "optimizer/grad_norm")


def ppo_config(model: Path, folder: Path, zero_stage: int, **learner: object) -> MeshConfig:
    section = {
        "dtype": "float32",
        "device": "cpu",
        "zero_stage": zero_stage,
        "tokens_per_micro_batch": 160,
        "ema_beta": BETA,
        "optimizer": {"lr": 1e-3},
        "critic": {"optimizer": {"lr": 3e-3}},
        **learner,
    }
    return mesh_config(model, folder, learner=section, algorithm={"type": "ppo", "entropy_coef": 0.01})


def train_batch(trainer: Trainer, ranks: Ranks, step: int) -> list[float]:
    """Train on this rank's share of the step's groups. Return the loss and the values of `METRICS`.

    The last step has one group, which is fewer than there may be ranks.
    """
    groups = random_groups(1 if step == NUM_STEPS else 3, 4, seed=step)
    (shares,) = split_batch([group.num_tokens for group in groups], 1, ranks.world_size)
    statistics = trainer.train([[groups[index] for index in shares[ranks.rank]]], step, 0)
    return [statistics.loss, *(statistics.metrics[name] for name in METRICS)]


def whole_weights(engine: PolicyEngine) -> dict[str, Tensor]:
    with engine.whole(spec.name for spec in engine.tensor_specs()) as tensors:
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def run(config: MeshConfig, ranks: Ranks) -> dict[str, list[list[float]]]:
    """Train all steps with a checkpoint in between, and train again from the checkpoint in new engines. Collective.

    The function writes the average by the formula to `average.safetensors` in the run folder. It also writes two
    exports: `export-step-…` after the training of all steps, and `export` after the resumed training.

    Returns:
        The results of `train_batch` for each step, without a resume ("through") and after the resume ("resumed").
    """
    learnables, store = load_learnables(config, ranks), build_checkpoint_store(config, ranks)
    trainer = build_trainer(config, learnables, ranks, NUM_STEPS)
    average, through = whole_weights(learnables.policy), []
    for step in range(1, NUM_STEPS + 1):
        through.append(train_batch(trainer, ranks, step))
        for name, tensor in whole_weights(learnables.policy).items():
            average[name] = BETA * average[name] + (1 - BETA) * tensor
        if step == SAVED_STEP:
            store.save(learnables, trainer.state(), step, PolicyVersion(0, step), is_last=False)
    store.wait()
    store.export(learnables, NUM_STEPS, is_last=False)
    store.wait()
    ranks.barrier()

    resumed = load_learnables(config, ranks)
    trainer = build_trainer(config, resumed, ranks, NUM_STEPS)
    trainer.load_state(store.load(resumed, SAVED_STEP).state)
    again = [train_batch(trainer, ranks, step) for step in range(SAVED_STEP + 1, NUM_STEPS + 1)]
    store.export(resumed, NUM_STEPS, is_last=True)
    store.wait()
    if ranks.is_first:
        save_file(average, config.run.folder / "average.safetensors")
    return {"through": through, "resumed": again}


def main() -> None:
    """Run each ZeRO stage in a folder of its own. Rank 0 writes `outcome.json` to the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stages", type=int, nargs="+", required=True)
    args = parser.parse_args()
    for stage in args.stages:
        config = ppo_config(args.model, args.folder / str(stage), stage)
        ranks = Ranks.start(config.learner)
        outcome = run(config, ranks)
        if ranks.is_first:
            (args.folder / str(stage) / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    ranks.stop()


if __name__ == "__main__":
    main()
    leave(0)
