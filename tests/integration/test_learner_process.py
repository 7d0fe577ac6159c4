"""The learner as a process, with a real Redis and a real broadcast, between a made-up coordinator and worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollmesh.replay.connection import connect
from rollmesh.replay.ledger import Ledger
from rollmesh.replay.server import EmbeddedServer
from rollmesh.types import GroupState, Heartbeat, PolicyVersion, PublishOutcome, RunState, WeightEpoch, WeightPlan
from rollmesh.v1 import coordinator_pb2 as pb
from rollmesh.weights.group import WeightGroup
from rollmesh.weights.plan import PlanMemory
from rollmesh.weights.receiver import Received, WeightReceiver
from rollmesh.wire import control, weights
from services.config import MeshConfig, dump_mesh
from tests.fakes.coordinator import FakeCoordinator
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

pytestmark = pytest.mark.engine

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_STEPS = 4
GROUPS_PER_BATCH = 4
DEADLINE_S = 200.0
METRICS = {
    *("reward/mean", "reward/std_in_group", "score/mean", "response/length_mean", "response/truncation_rate"),
    *("policy/loss", "policy/clip_fraction_low", "policy/clip_fraction_high", "policy/kl_behaviour", "policy/entropy"),
    *("kl/reference", "importance/mean", "importance/max", "staleness/mean", "staleness/max"),
    *("optimizer/grad_norm", "optimizer/lr", "tokens/generated", "tokens/trained"),
    *("time/step_s", "time/wait_s", "time/intake_s", "time/forward_backward_s", "time/publish_s"),
    "time/since_start_s",
}


class Mesh(FakeCoordinator):
    """Coordinator and rollout worker in one: receives weights, and answers each commit with the next groups.

    Attributes:
        aborted: versions whose next publish is aborted, by number.
        committed: numbers in the order of their commits.
        has_committed: set by the first commit.
        is_idle: the worker makes no groups.
        claimed_version: what groups claim to be of instead of the version that serves.
    """

    def __init__(self, ledger: Ledger, num_groups: int) -> None:
        super().__init__(heartbeat_interval_s=0.2, member_timeout_s=20.0)
        self.heartbeat = Heartbeat(RunState.STARTING, None)
        self.aborted: set[int] = set()
        self.committed: list[int] = []
        self.claimed_version: int | None = None
        self.has_committed = asyncio.Event()
        self.is_idle = False
        self._ledger = ledger
        self._num_groups = num_groups
        self._num_made = 0
        self._epoch = WeightEpoch(0, "", 0, 2)
        self._group: WeightGroup | None = None
        self.receiver = WeightReceiver()
        self._plans = PlanMemory()
        self._receiving: asyncio.Future[Received] | None = None

    async def BeginPublish(self, request: pb.BeginPublishRequest, context: Any) -> pb.BeginPublishResponse:
        call = weights.begin_publish_from_proto(request)
        self.begun.append(call)
        plan = self._plans.find(call.plan, call.plan_digest)
        assert plan is not None, "the learner sends the plan first"
        if self._group is None:
            self._epoch = WeightEpoch(self._epoch.number + 1, call.store_host, call.store_port, 2)
        self._receiving = asyncio.ensure_future(asyncio.to_thread(self._receive, plan, self._epoch))
        return weights.begin_publish_answer_to_proto(self._epoch)

    def _receive(self, plan: WeightPlan, epoch: WeightEpoch) -> Received:
        if self._group is None:
            self._group = WeightGroup.join(epoch, 1, 30.0)
        return self.receiver.receive(self._group, plan, 30.0)

    async def FinishPublish(self, request: pb.FinishPublishRequest, context: Any) -> pb.FinishPublishResponse:
        call = weights.finish_publish_from_proto(request)
        self.finished.append(call)
        assert self._receiving is not None
        received = await self._receiving
        assert received.digest == call.digest
        number = call.version.number
        if number in self.aborted:
            self.aborted.remove(number)
            assert self._group is not None
            self._group.close()
            self._group = None
            return weights.publish_outcome_to_proto(PublishOutcome(False, "as the test wants", (), 0.0))
        self.committed.append(number)
        self.has_committed.set()
        self.heartbeat = Heartbeat(RunState.RUNNING, call.version)
        if not self.is_idle:
            await self._make_groups(number)
        return weights.publish_outcome_to_proto(PublishOutcome(True, "", ("rollout-0",), 0.01))

    async def _make_groups(self, number: int) -> None:
        """Fill the slots of max_staleness = 1 as a fast worker would: two batches ahead of the last commit."""
        num_wanted = min(self._num_groups, (number + 2) * GROUPS_PER_BATCH)
        version = number if self.claimed_version is None else self.claimed_version
        new = random_groups(num_wanted - self._num_made, 4, seed=number, first_prompt=self._num_made, version=version)
        self._num_made = num_wanted
        await self._ledger.open_groups([group.prompt_id for group in new])
        for row in await self._ledger.lease("rollout-0", 100.0, len(new)):
            (group,) = (group for group in new if group.group_id == row.group_id)
            await self._ledger.commit(group, row.fencing_token)
        if self._num_made == self._num_groups:
            await self._ledger.close_intake()

    async def ReportStep(self, request: pb.ReportStepRequest, context: Any) -> pb.ReportStepResponse:
        call = control.report_step_from_proto(request)
        if call.is_last:
            self.heartbeat = Heartbeat(RunState.FINISHED, call.version)
        return await super().ReportStep(request, context)


class Learner:
    """The process, with the mesh around it."""

    def __init__(self, process: asyncio.subprocess.Process, mesh: Mesh, ledger: Ledger, config: MeshConfig) -> None:
        self.process, self.mesh, self.ledger, self.config = process, mesh, ledger, config

    async def ended(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, stderr = await asyncio.wait_for(self.process.communicate(), DEADLINE_S)
        assert self.process.returncode is not None
        return self.process.returncode, stderr.decode()


@asynccontextmanager
async def _learner(folder: Path, num_groups: int, **sections: dict[str, Any]) -> AsyncIterator[Learner]:
    # A socket's path is short; the folders of pytest are not.
    with EmbeddedServer.start(folder / "redis") as server:
        redis = connect(server.url, 5.0)
        ledger = Ledger(redis, "learner-test")
        mesh = Mesh(ledger, num_groups)
        async with mesh.serve() as coordinator:
            config = mesh_config(
                write_tiny_model(folder / "model"),
                folder,
                replay={"url": server.url},
                coordinator={"address": coordinator.address},
                **sections,
            )
            (folder / "mesh.yaml").write_text(dump_mesh(config), encoding="utf-8")
            environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "rollmesh.cli", "learner", "--config", str(folder / "mesh.yaml")),
                cwd=REPOSITORY,
                env=environment,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                yield Learner(process, mesh, ledger, config)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                await redis.aclose()


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 3)])
def test_a_run_trains_publishes_checkpoints_and_says_so(tmp_path: Path, num_ranks: int, zero_stage: int) -> None:
    """15 groups in batches of 4: the last batch is partial. The first publish of version 2 is aborted."""

    async def scenario() -> None:
        learner_section = {
            "num_ranks": num_ranks,
            "zero_stage": zero_stage,
            "checkpoint": {"every_steps": 2, "max_kept": 3},
            "should_record_batches": True,
            "tokens_per_micro_batch": 200,
        }
        small_buckets = {"bucket_bytes": 60_000}
        async with _learner(tmp_path, 15, learner=learner_section, weights=small_buckets) as learner:
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
        async with _learner(tmp_path, 32, training={"steps": 8, "prompts_per_step": 4}) as learner:
            learner.mesh.claimed_version = 0
            code, stderr = await learner.ended()
            assert code == 1
            assert "staleness bound is 2" in stderr
            assert "Traceback" not in stderr.splitlines()[-1]
            assert "staleness bound is 2" in learner.mesh.left[-1].failure

    asyncio.run(scenario())


def test_a_learner_that_is_stopped_tells_the_mesh_and_does_not_exit_with_zero(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with _learner(tmp_path, 1000) as learner:
            learner.mesh.is_idle = True
            async with asyncio.timeout(DEADLINE_S):
                await learner.mesh.has_committed.wait()
            await asyncio.sleep(0.5)  # the learner hears of it and waits for a batch
            learner.process.send_signal(signal.SIGTERM)
            code, _ = await learner.ended()
            assert code == 128 + signal.SIGTERM
            assert "signal 15" in learner.mesh.left[-1].failure

    asyncio.run(scenario())


def test_a_learner_ends_when_the_run_fails_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with _learner(tmp_path, 1000) as learner:
            learner.mesh.is_idle = True
            async with asyncio.timeout(DEADLINE_S):
                await learner.mesh.has_committed.wait()
            learner.mesh.heartbeat = Heartbeat(RunState.FAILED, None, "rollout-0 fell over")
            code, stderr = await learner.ended()
            assert code == 1
            assert "rollout-0 fell over" in stderr

    asyncio.run(scenario())
