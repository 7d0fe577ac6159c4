"""A learner that is killed and started again ends with the results of a learner that is not killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rollmesh.replay.accounting import account
from rollmesh.replay.recording import read_facts
from rollmesh.types import GroupState, PolicyVersion
from tests.integration.learner_process import DEADLINE_S, GROUPS_PER_BATCH, Learner, Mesh, learner_process

pytestmark = pytest.mark.engine

NUM_STEPS = 6
EVERY_GROUP = {f"train:0:{index}" for index in range(NUM_STEPS * GROUPS_PER_BATCH)}
LEARNER: dict[str, Any] = {
    "checkpoint": {"every_steps": 2, "max_kept": 2},
    "ema_beta": 0.9,
    "should_record_batches": True,
    "tokens_per_micro_batch": 200,
}
ALGORITHM: dict[str, Any] = {
    "type": "ppo",
    "reward": {"normalize": True},
}


@dataclass
class Trace:
    """The results of a run."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    batches: list[list[str]]
    metrics: list[dict[str, Any]]
    versions: list[PolicyVersion]


async def run(
    folder: Path,
    kills: list[Callable[[Mesh], bool]],
    *,
    max_staleness: int = 0,
    num_ranks: int = 1,
    zero_stage: int = 0,
) -> Trace:
    """Train `NUM_STEPS` steps. Kill the learner, and start it again, when each of ``kills`` in turn becomes true."""
    sections: dict[str, Any] = {
        "training": {"steps": NUM_STEPS, "max_staleness": max_staleness},
        "learner": {**LEARNER, "num_ranks": num_ranks, "zero_stage": zero_stage},
        "algorithm": ALGORITHM,
    }
    async with learner_process(folder, NUM_STEPS * GROUPS_PER_BATCH, **sections) as learner:
        mesh = learner.mesh
        for is_time in kills:
            mesh.holds_when = is_time
            await _until_held(learner)
            await learner.kill()
            mesh.holds_when = None
            mesh.holds.clear()
            await learner.start()
        code, stderr = await learner.ended()
        assert code == 0, stderr
        books = await account(learner.ledger)
        assert books["is_balanced"]
        assert books["num_groups"][GroupState.RETIRED.value] == NUM_STEPS * GROUPS_PER_BATCH
        return _trace(learner.config.run.folder, learner.mesh)


async def _until_held(learner: Learner) -> None:
    """Wait until the learner waits for an answer that does not come."""
    assert learner.process is not None
    async with asyncio.timeout(DEADLINE_S):
        while not learner.mesh.holds.is_set():
            assert learner.process.returncode is None, (await learner.ended())[1]
            await asyncio.sleep(0.005)


def _trace(folder: Path, mesh: Mesh) -> Trace:
    files = sorted((folder / "batches").iterdir())
    batches = [read_facts(file)[1] for file in files]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Trace(
        weights=_weights(folder / "export"),
        average=_weights(folder / "export" / "average"),
        batches=batches,
        metrics=lines,
        versions=[call.version for call in mesh.finished],
    )


def _weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def reported(step: int) -> Callable[[Mesh], bool]:
    """Return the moment at which ``step`` has been reported and the next step is being trained."""
    return lambda mesh: bool(mesh.steps) and mesh.steps[-1].step == step


def announced(step: int) -> Callable[[Mesh], bool]:
    """Return the moment at which the version that ``step`` made is on its way to the engines."""
    return lambda mesh: bool(mesh.begun) and mesh.begun[-1].step == step and len(mesh.begun) > len(mesh.finished)


def at_random(seed: int) -> list[Callable[[Mesh], bool]]:
    """Return three random moments, each at another step, in the order of the steps."""
    chosen = random.Random(seed)
    steps = sorted(chosen.sample(range(1, NUM_STEPS), 3))
    return [chosen.choice((reported, announced))(step) for step in steps]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return asyncio.run(run(tmp_path_factory.mktemp("undisturbed"), []))


def test_a_learner_killed_three_times_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, undisturbed: Trace
) -> None:
    """Policy, critic, average, running moments and random generators are restored. Each group is trained once."""
    trace = asyncio.run(run(tmp_path, at_random(seed=3)))
    assert trace.batches == undisturbed.batches
    assert sorted(itertools.chain(*trace.batches)) == sorted(EVERY_GROUP)
    assert_same(undisturbed.weights, trace.weights)
    assert_same(undisturbed.average, trace.average)


def test_metrics_go_on_without_a_gap_or_a_double_line(tmp_path: Path, undisturbed: Trace) -> None:
    trace = asyncio.run(run(tmp_path, [reported(3), announced(5)]))
    assert [line["step"] for line in trace.metrics] == list(range(1, NUM_STEPS + 1))
    for line, expected in zip(trace.metrics, undisturbed.metrics, strict=True):
        for name in ("policy/loss", "value/loss", "reward/mean", "optimizer/lr", "filter/pass_rate", "staleness/max"):
            assert line[name] == pytest.approx(expected[name], abs=1e-6), (line["step"], name)
    elapsed = [line["time/since_start_s"] for line in trace.metrics]
    assert elapsed == sorted(elapsed)
    lineages = [version.lineage for version in trace.versions]
    numbers = [version.number for version in trace.versions]
    assert lineages == sorted(lineages)
    assert lineages[-1] >= 1, "a learner that lost a served version begins a new lineage"
    assert numbers == sorted(numbers)


def test_two_ranks_of_a_sharded_learner_go_on_together(tmp_path: Path) -> None:
    whole = asyncio.run(run(tmp_path / "whole", [], num_ranks=2, zero_stage=2))
    killed = asyncio.run(run(tmp_path / "killed", [reported(3)], num_ranks=2, zero_stage=2))
    assert killed.batches == whole.batches
    assert_same(whole.weights, killed.weights)


def test_groups_of_the_lineage_that_was_left_are_trained_where_they_are_young_enough(tmp_path: Path) -> None:
    trace = asyncio.run(run(tmp_path, [reported(5)], max_staleness=1))
    assert sorted(itertools.chain(*trace.batches)) == sorted(EVERY_GROUP)
    assert [line["step"] for line in trace.metrics] == list(range(1, NUM_STEPS + 1))
    assert max(line["staleness/max"] for line in trace.metrics) <= 2
