"""What the mesh costs the engine: the rollout worker's tokens per second against the same engine asked directly."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from pathlib import Path

import uvloop

from rollmesh.types import SamplingSpec
from tests.bench.figures import Figure, median
from tests.bench.model import write_model
from tests.bench.worker_rig import Throughput, WorkerRig, running_worker

LONG, SHORT = (128, 384), (16, 48)
"""Shortest and longest answers, in tokens."""


def run(quick: bool) -> list[Figure]:
    """Tokens per second, in turns, for long answers and for short ones."""
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as folder:
        model = write_model(Path(folder) / "model")
        overrides = [
            f"model.path={model}",
            "model.max_length=400",
            "sampling.max_new_tokens=384",
        ]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            long, short = runner.run(_measure(Path(folder), overrides, quick))
    return [
        _figure("rollout_through_mesh", "answers of 128 to 384 tokens", 0.97, long),
        _figure("rollout_short_answers", "answers of 16 to 48 tokens", None, short),
    ]


Pairs = list[tuple[Throughput, Throughput]]


async def _measure(folder: Path, overrides: list[str], quick: bool) -> tuple[Pairs, Pairs]:
    num_pairs = 2 if quick else 7
    long, short = _samplings(8 if quick else 16, LONG), _samplings(24 if quick else 64, SHORT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    async with asyncio.timeout(280), running_worker(folder, overrides) as rig:
        await _pairs(rig, long, 1)  # finds engine, reward service and allocators cold
        return await _pairs(rig, long, num_pairs), await _pairs(rig, short, num_pairs)


async def _pairs(rig: WorkerRig, samplings: list[SamplingSpec], num_pairs: int) -> Pairs:
    return [(await rig.engine_alone(samplings), await rig.through_mesh(samplings)) for _ in range(num_pairs)]


def _samplings(num_groups: int, lengths: tuple[int, int]) -> list[SamplingSpec]:
    """Groups of many lengths, the same ones for both sides."""
    generator = random.Random(0)
    return [SamplingSpec(1.0, 1.0, 0, generator.randint(*lengths)) for _ in range(num_groups)]


def _figure(name: str, lengths: str, goal: float | None, pairs: Pairs) -> Figure:
    for alone, mesh in pairs:
        assert alone.num_tokens == mesh.num_tokens, "both sides generate the same"
    return Figure(
        name,
        f"tokens/s of the rollout worker / of its engine alone, {lengths}",
        goal,
        "at least",
        [mesh.tokens_per_s / alone.tokens_per_s for alone, mesh in pairs],
        {
            "mesh_tokens_per_s": median([mesh.tokens_per_s for _, mesh in pairs]),
            "engine_tokens_per_s": median([alone.tokens_per_s for alone, _ in pairs]),
            "num_tokens": pairs[0][0].num_tokens,
        },
    )
