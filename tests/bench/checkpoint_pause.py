"""The time for which training stands still for a checkpoint, against the time until the checkpoint is on disk.

Training waits until all tensors are copied to main memory. A thread then writes and syncs the files; before, training
waited for that as well.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from rollmesh.types import PolicyVersion
from services.learner.checkpoint import Learnables
from services.learner.composition import build_checkpoint_store, build_trainer, load_policy
from services.learner.ranks import Ranks
from tests.bench.figures import Figure, median
from tests.bench.model import write_model
from tests.unit.learner.samples import mesh_config, random_groups


def run(quick: bool) -> list[Figure]:
    """Seconds for a checkpoint with its export, of a policy in float32 with the state of its optimiser."""
    pauses, wholes = [], []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        model = write_model(Path(folder) / "model", hidden=768, layers=6)
        section = {"dtype": "float32", "device": "cpu", "tokens_per_micro_batch": 4096, "checkpoint": {"max_kept": 1}}
        config = mesh_config(model, Path(folder), learner=section)
        ranks = Ranks.start(config.learner)
        learnables = Learnables(load_policy(config, ranks))
        trainer, store = build_trainer(config, learnables, ranks, 10**6), build_checkpoint_store(config, ranks)
        trainer.train([random_groups(2, 4)], 1, 0)
        for step in range(1, 4 if quick else 10):
            started = time.perf_counter()
            store.save(learnables, trainer.state(), step, PolicyVersion(0, step), is_last=False)
            pauses.append(time.perf_counter() - started)
            store.wait()
            wholes.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in config.run.folder.rglob("*") if file.is_file())
        ranks.stop()
        shutil.rmtree(config.run.folder)
    return [
        Figure(
            "checkpoint_pause",
            "time for which training stands still for a checkpoint and export / until they are on disk",
            0.25,
            "at most",
            [pause / whole for pause, whole in zip(pauses, wholes, strict=True)],
            {"pause_s": median(pauses), "whole_s": median(wholes), "bytes_on_disk": size},
        )
    ]
