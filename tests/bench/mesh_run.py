"""Whole runs of the mesh, asynchronous and synchronous, against generation and training each alone.

The demo without reference and evaluation, at a learning rate that leaves the policy what it is, so that every batch is
the same amount of work. The clock runs over the steps after the first two, which find engine and caches cold.

* generation alone: tokens of those batches / tokens per second of the rollout worker with nobody training;
* training alone: the learner's step on the recorded batches, with nobody generating;
* an asynchronous run can approach the larger of the two where generation and training have cores of their own, and
  their sum where they share them; a synchronous run takes at least the sum anywhere.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from rollmesh.replay.recording import load_recorded
from rollmesh.types import SamplingSpec
from services.config import load_mesh
from services.learner.checkpoint import Learnables
from services.learner.composition import build_trainer, load_policy
from services.learner.ranks import Ranks
from tests.bench.figures import Figure, median
from tests.bench.worker_rig import DEMO, running_worker
from tests.integration.mesh_runs import MeshRun, finish_mesh, service_logs, start_mesh

WARM_UP_STEPS = 2
RUN_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 50.0


@dataclass(frozen=True)
class _Steps:
    """The steps of a run that count."""

    lines: Sequence[dict[str, Any]]
    seconds: Sequence[float]

    @classmethod
    def of(cls, run: MeshRun) -> _Steps:
        lines = run.lines("metrics.jsonl")
        ends = [float(line["time/since_start_s"]) for line in lines]
        pairs = zip(ends[WARM_UP_STEPS - 1 :], ends[WARM_UP_STEPS:], strict=False)
        return cls(lines[WARM_UP_STEPS:], [end - start for start, end in pairs])

    def column(self, name: str) -> list[float]:
        return [float(line[name]) for line in self.lines]

    @property
    def tokens_per_step(self) -> float:
        return sum(self.column("tokens/generated")) / len(self.lines)

    @property
    def step_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)


def run(quick: bool) -> list[Figure]:
    """Four measurements, one after the other: two runs, generation alone, training alone."""
    num_steps = 6 if quick else 16
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory(prefix="bench-mesh-") as name:
        folder = Path(name)
        asynchronous = _run(folder, "asynchronous", num_steps, 1)
        synchronous = _run(folder, "synchronous", num_steps, 0)
        tokens_per_s = _generation_alone(folder / "alone", quick)
        training_s = _training_alone(folder / "asynchronous")
    generation_s = asynchronous.tokens_per_step / tokens_per_s
    larger_s, sum_s = max(generation_s, training_s), generation_s + training_s
    tokens_ratio = synchronous.tokens_per_step / asynchronous.tokens_per_step
    details = {
        "asynchronous_step_s": asynchronous.step_s,
        "synchronous_step_s": synchronous.step_s,
        "generation_alone_s": generation_s,
        "training_alone_s": training_s,
        "asynchronous_to_sum": asynchronous.step_s / sum_s,
        "synchronous_to_sum": synchronous.step_s / sum_s / tokens_ratio,
        "synchronous_to_asynchronous": synchronous.step_s / asynchronous.step_s / tokens_ratio,
        "generation_alone_tokens_per_s": tokens_per_s,
        "tokens_per_step": asynchronous.tokens_per_step,
        "num_cores": os.cpu_count(),
        "max_staleness_seen": max(asynchronous.column("staleness/max")),
    }
    pauses = asynchronous.column("time/pause_s")
    return [
        Figure(
            "asynchronous_wall_clock",
            "time of an asynchronous step / of the larger of generation and training alone",
            1.05,
            "at most",
            [seconds / larger_s for seconds in asynchronous.seconds],
            details,
            reported=asynchronous.step_s / larger_s,
        ),
        Figure(
            "engine_pause",
            "time that the engine stands still for an update / time of a step",
            None,
            "at most",
            [pause / asynchronous.step_s for pause in pauses],
            {
                "pause_s": median(pauses),
                "max_pause_s": max(pauses),
                "publish_s": median(asynchronous.column("time/publish_s")),
                "step_s": asynchronous.step_s,
            },
        ),
    ]


def _overrides(num_steps: int, max_staleness: int) -> list[str]:
    return [
        "evaluation=null",
        "algorithm.kl.coef=0",
        f"training.steps={num_steps}",
        f"training.max_staleness={max_staleness}",
        "learner.optimizer.lr=1.0e-9",
        "learner.should_record_batches=true",
        "learner.checkpoint.should_export=false",
    ]


def _run(folder: Path, name: str, num_steps: int, max_staleness: int) -> _Steps:
    process = start_mesh(DEMO, folder, [f"run.name={name}", *_overrides(num_steps, max_staleness)])
    try:
        run = finish_mesh(process, folder / name, RUN_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
    if run.exit_code:
        raise RuntimeError(f"the {name} run ended with {run.exit_code}:\n{run.output}\n{service_logs(run.folder)}")
    return _Steps.of(run)


def _training_alone(run_folder: Path) -> float:
    """Seconds of a step on the recorded batches, mean over those that count."""
    config = load_mesh(run_folder / "mesh.yaml")
    batches = [load_recorded(path)[1] for path in sorted((run_folder / "batches").glob("step-*.msgpack"))]
    ranks = Ranks.start(config.learner)
    trainer = build_trainer(config, Learnables(load_policy(config, ranks)), ranks, len(batches))
    started = time.perf_counter()
    for step, groups in enumerate(batches, start=1):
        if step == WARM_UP_STEPS + 1:
            started = time.perf_counter()
        newest = max(sample.newest_version.number for group in groups for sample in group.samples)
        trainer.train([groups], step, newest)
    seconds = time.perf_counter() - started
    ranks.stop()
    return seconds / (len(batches) - WARM_UP_STEPS)


def _generation_alone(folder: Path, quick: bool) -> float:
    """Tokens per second of the worker that the runs used, with nothing beside it; the median of some rounds."""
    folder.mkdir()
    samplings = [SamplingSpec(1.0, 1.0, 0, 66)] * (64 if quick else 192)

    async def measure() -> float:
        async with asyncio.timeout(200), running_worker(folder, []) as rig:
            await rig.through_mesh(samplings)
            return median([(await rig.through_mesh(samplings)).tokens_per_s for _ in range(2 if quick else 4)])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure())
