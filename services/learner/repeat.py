"""The learner's side of a run once more, on recorded batches: no Redis, no coordinator, no engines.

::

    initial model, or checkpoint ─► train on step-000003.msgpack ─► ... ─► export, or a checkpoint for the next part
                                         │
                                         └─► a line of metrics.jsonl for each step

The ranks, the division of a batch among them and the trainer are those of a run. So the same batches give the same
losses and the same weights, to the bit on the same hardware with the same number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rollmesh.replay.recording import load_recorded, read_facts, recorded_paths
from rollmesh.replay.replay_part import ReplayPart
from services.config import MeshConfig
from services.learner.batching import split_batch
from services.learner.composition import build_checkpoint_store, build_trainer, load_learnables
from services.learner.metrics import MetricsFile
from services.learner.ranks import Ranks


def repeat(part: ReplayPart, config: MeshConfig, ranks: Ranks) -> None:
    """Train on the batches of a part in their order. Collective.

    Args:
        part: the steps, and where they start.
        config: the configuration with which the part was trained.
        ranks: the process group.

    Raises:
        ConfigError: the checkpoint does not fit the configuration.
        RollMeshError: a batch is damaged, or a step failed.
    """
    paths = recorded_paths(Path(part.batches))
    facts, _ = read_facts(paths[part.first])
    learnables = load_learnables(config, ranks)
    state: Mapping[str, float] = {}
    if part.start:
        saved = build_checkpoint_store(_in_folder(config, Path(part.start)), ranks)
        state = saved.load(learnables, part.first - 1).state
    trainer = build_trainer(config, learnables, ranks, facts.num_batches)
    if state:
        trainer.load_state(state)
    metrics_file, version = MetricsFile(Path(part.out) / "metrics.jsonl"), facts.policy_version
    for step in range(part.first, part.last + 1):
        facts, groups = load_recorded(paths[step])
        version = facts.policy_version.next()
        split = split_batch([group.num_tokens for group in groups], config.learner.steps_per_batch, ranks.world_size)
        mine = [[groups[index] for index in shares[ranks.rank]] for shares in split]
        statistics = trainer.train(mine, step, facts.policy_version.number)
        if ranks.is_first:
            metrics_file.append(step, version, statistics.staleness_histogram, statistics.metrics)
    store = build_checkpoint_store(_in_folder(config, Path(part.out)), ranks)
    if part.is_last:
        store.export(learnables, part.last, is_last=True)
    else:
        store.save(learnables, trainer.state(), part.last, version, is_last=False)
    store.wait()


def _in_folder(config: MeshConfig, folder: Path) -> MeshConfig:
    """Return the configuration of a run in ``folder``, where its checkpoints and exports are."""
    run = config.run.model_copy(update={"directory": folder.parent, "name": folder.name})
    return config.model_copy(update={"run": run})
