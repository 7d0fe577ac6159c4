"""The witness: what a run trained is read from its final weights, and not from its own counters.

::

    initial model ─► recorded batch of step 1 ─► ... ─► recorded batch of step N ─► weights ── equal to ──► the export

The trainer of the learner repeats exactly the recorded batches, in a process of its own. Its weights are those of the
run's export only if each batch moved the weights once, after the batch before: a batch that was lost or that was
trained twice moves the weights by far more than `TOLERANCE`.

::

    python -m tests.chaos.witness RUN FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollmesh.replay.recording import load_recorded
from rollmesh.types import PolicyVersion
from services.config import MeshConfig, load_mesh
from services.learner.batching import split_batch
from services.learner.composition import build_trainer, load_learnables
from services.learner.process import quiet_libraries
from services.learner.ranks import Ranks, leave
from tests.integration.mesh_runs import REPOSITORY, MeshRun

TOLERANCE = 1e-6
"""The largest difference of a weight in float32 between the run and its repetition."""
TIMEOUT_S = 300.0


def difference(run: MeshRun, folder: Path) -> float:
    """Return the largest difference between a weight of the run's export and of its repetition.

    Args:
        run: a run that recorded its batches.
        folder: the folder to which the repetition writes its export.
    """
    repeat_in_process(run.folder, folder)
    mine, theirs = weights(folder), weights(run.folder / "export")
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def weights(folder: Path) -> dict[str, Any]:
    """Return the weights of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def repeat_in_process(run: Path, folder: Path) -> None:
    """Repeat a run's recorded batches in a process of its own, and write the policy to ``folder``."""
    num_ranks = load_mesh(run / "mesh.yaml").learner.num_ranks
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.chaos.witness", str(run), str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, timeout=TIMEOUT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def repeat(
    config: MeshConfig, ranks: Ranks, batches: Sequence[Path], starting_numbers: Sequence[int], folder: Path
) -> None:
    """Train on recorded batches from the initial model, and write the policy to ``folder``. Collective.

    Args:
        config: the configuration of the run.
        ranks: the process group.
        batches: the recorded batch of each step.
        starting_numbers: the number of the version from which each step started.
        folder: the folder for the policy.
    """
    learnables = load_learnables(config, ranks)
    trainer = build_trainer(config, learnables, ranks, config.training.steps)
    for step, (path, number) in enumerate(zip(batches, starting_numbers, strict=True), start=1):
        _, groups = load_recorded(path)
        split = split_batch([group.num_tokens for group in groups], config.learner.steps_per_batch, ranks.world_size)
        trainer.train([[groups[index] for index in shares[ranks.rank]] for shares in split], step, number)
    state = learnables.policy.copy_weights()
    if ranks.is_first:
        learnables.policy.write_pretrained(folder, state)


def starting_numbers(run: Path) -> list[int]:
    """Return the number of the version from which each step started: one less than the version that the step made."""
    lines = MeshRun(run, 0, "").lines("metrics.jsonl")
    return [PolicyVersion.parse(line["version"]).number - 1 for line in lines]


def main(run: str, folder: str) -> None:
    """Repeat the run in the folder ``run``."""
    quiet_libraries()
    batches = sorted((Path(run) / "batches").glob("step-*.msgpack"))
    config = load_mesh(Path(run) / "mesh.yaml")
    ranks = Ranks.start(config.learner)
    repeat(config, ranks, batches, starting_numbers(Path(run)), Path(folder))
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
