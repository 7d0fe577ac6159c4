"""The learner as a process: its training, its publishes, its files and its reports."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollmesh.errors import EXIT_START_AGAIN
from rollmesh.types import GroupState, Heartbeat, PolicyVersion, RunState
from tests.integration.learner_process import DEADLINE_S, Mesh, learner_process

pytestmark = pytest.mark.engine

NUM_STEPS = 4
METRICS = {
    *("reward/mean", "reward/std_in_group", "score/mean", "response/length_mean", "response/truncation_rate"),
    *("policy/loss", "policy/clip_fraction_low", "policy/clip_fraction_high", "policy/kl_behaviour", "policy/entropy"),
    *("kl/reference", "importance/mean", "importance/max", "staleness/mean", "staleness/max"),
    *("optimizer/grad_norm", "optimizer/lr", "tokens/generated", "tokens/trained"),
    *("time/step_s", "time/wait_s", "time/intake_s", "time/forward_backward_s", "time/publish_s"),
    "time/since_start_s",
}


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 3)])
def test_a_run_trains_publishes_checkpoints_and_says_so(tmp_path: Path, num_ranks: int, zero_stage: int) -> None:
    """15 groups in batches of 4 make the last batch partial. The first publishes of versions 0 and 2 are aborted."""

    async def scenario() -> None:
        learner_section = {
            "num_ranks": num_ranks,
            "zero_stage": zero_stage,
            "checkpoint": {"every_steps": 2, "max_kept": 3},
            "should_record_batches": True,
            "tokens_per_micro_batch": 200,
        }
        small_buckets = {"bucket_bytes": 60_000}
        async with learner_process(tmp_path, 15, learner=learner_section, weights=small_buckets) as learner:
            mesh = learner.mesh
            mesh.aborted = {0, 2}
            code, stderr = await learner.ended()
            assert code == 0, stderr
            states = [row.state async for row in learner.ledger.rows()]
            assert states == [GroupState.RETIRED] * 15
            assert mesh.committed == [0, 1, 3, 4]
            assert [call.failure for call in mesh.left] == [""]
            reported = [(call.step, call.version, call.is_last) for call in mesh.steps]
            expected = [(step, PolicyVersion(0, step), False) for step in range(1, NUM_STEPS + 1)]
            assert reported == [*expected, (NUM_STEPS, PolicyVersion(0, NUM_STEPS), True)]
            _check_run_folder(learner.config.run.folder, mesh)

    asyncio.run(scenario())


def _check_run_folder(folder: Path, mesh: Mesh) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(set(line) >= METRICS for line in lines)
    assert sum(lines[-1]["staleness_histogram"].values()) == 3 * 4
    exported = AutoModelForCausalLM.from_pretrained(folder / "export", dtype="auto").state_dict()
    received = dict(mesh.receiver.tensors())
    assert received
    for name, tensor in received.items():
        assert torch.equal(exported[name], tensor)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000004"]
    batches = sorted(path.name for path in (folder / "batches").iterdir())
    assert batches == [f"step-{step:06d}.msgpack" for step in range(1, NUM_STEPS + 1)]


def test_a_sample_over_the_staleness_bound_fails_the_run_with_a_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with learner_process(tmp_path, 32, training={"steps": 8, "prompts_per_step": 4}) as learner:
            learner.mesh.claimed_version = 0
            code, stderr = await learner.ended()
            assert code == 1
            assert "staleness bound is 2" in stderr
            assert "Traceback" not in stderr.splitlines()[-1]
            assert "staleness bound is 2" in learner.mesh.left[-1].failure

    asyncio.run(scenario())


def test_a_learner_that_is_stopped_tells_the_mesh_and_does_not_exit_with_zero(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with learner_process(tmp_path, 1000) as learner:
            learner.mesh.is_idle = True
            async with asyncio.timeout(DEADLINE_S):
                await learner.mesh.has_committed.wait()
            await asyncio.sleep(0.5)  # until the learner knows of the commit and waits for a batch
            assert learner.process is not None
            learner.process.send_signal(signal.SIGTERM)
            code, _ = await learner.ended()
            assert code == 128 + signal.SIGTERM
            assert "signal 15" in learner.mesh.left[-1].failure

    asyncio.run(scenario())


def test_a_learner_ends_when_the_run_fails_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with learner_process(tmp_path, 1000) as learner:
            learner.mesh.is_idle = True
            async with asyncio.timeout(DEADLINE_S):
                await learner.mesh.has_committed.wait()
            learner.mesh.heartbeat = Heartbeat(RunState.FAILED, None, "rollout-0 fell over")
            code, stderr = await learner.ended()
            assert code == 1
            assert "rollout-0 fell over" in stderr

    asyncio.run(scenario())


def test_a_learner_of_which_one_rank_is_killed_ends_and_asks_for_a_new_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with learner_process(tmp_path, 1000, learner={"num_ranks": 2}) as learner:
            learner.mesh.is_idle = True
            async with asyncio.timeout(DEADLINE_S):
                await learner.mesh.has_committed.wait()
            assert learner.process is not None
            ranks = psutil.Process(learner.process.pid).children()
            (second,) = [rank for rank in ranks if rank.environ()["RANK"] == "1"]
            second.kill()
            code, stderr = await learner.ended()
            assert code == EXIT_START_AGAIN
            assert stderr.splitlines()[-1] == "error: rank 1 was killed by signal 9; the other ranks were ended"
            assert not [rank for rank in ranks if rank.is_running()]
            assert all(call.is_replaceable for call in learner.mesh.left)

    asyncio.run(scenario())
