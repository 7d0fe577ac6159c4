"""A learner as a process, with a real Redis and a real broadcast, and with a fake coordinator and worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from rollmesh.aio.supervisor import Supervisor
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.types import Heartbeat, PolicyVersion, PromptId, PublishOutcome, RunState, WeightEpoch, WeightPlan
from rollmesh.v1 import coordinator_pb2 as pb
from rollmesh.weights.group import WeightGroup
from rollmesh.weights.plan import PlanMemory
from rollmesh.weights.receiver import Received, WeightReceiver
from rollmesh.wire import control, weights
from services.config import MeshConfig, dump_mesh
from tests.fakes.coordinator import FakeCoordinator
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
GROUPS_PER_BATCH = 4
DEADLINE_S = 200.0


class Mesh(FakeCoordinator):
    """A coordinator and a rollout worker in one, which receive weights and make the next groups after each commit.

    Attributes:
        aborted: the numbers of the versions whose next publish is aborted.
        committed: the numbers of the committed versions, in the order of their commits.
        has_committed: set by the first commit.
        is_idle: True stops the worker from making groups.
        claimed_version: the version number that groups carry instead of the serving version's; None for the serving
            version's.
        max_staleness: the number of batches that the worker makes ahead of the last commit.
        holds_when: the mesh answers the call of the learner that makes this true no more; None answers every call.
        holds: set while the mesh holds an answer back.
    """

    def __init__(self, ledger: CoordinatorLedger, num_groups: int) -> None:
        super().__init__(heartbeat_interval_s=0.2, member_timeout_s=20.0)
        self.heartbeat = Heartbeat(RunState.STARTING, None)
        self.aborted: set[int] = set()
        self.committed: list[int] = []
        self.claimed_version: int | None = None
        self.has_committed = asyncio.Event()
        self.is_idle = False
        self.max_staleness = 1
        self.holds_when: Callable[[Mesh], bool] | None = None
        self.holds = asyncio.Event()
        self._ledger = ledger
        self._num_groups = num_groups
        self._serving: tuple[PolicyVersion, int] | None = None
        self._epoch = WeightEpoch(0, "", 0, 2)
        self._group: WeightGroup | None = None
        self.receiver = WeightReceiver()
        self._plans = PlanMemory()
        self._receiving: asyncio.Future[Received] | None = None

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        self._leave_group()  # the store of the old group ended with the old learner's process
        newest = await self._ledger.newest_version()
        self.registration = replace(self.registration, newest_version=None if newest is None else newest.version)
        return await super().Register(request, context)

    async def BeginPublish(self, request: pb.BeginPublishRequest, context: Any) -> pb.BeginPublishResponse:
        call = weights.begin_publish_from_proto(request)
        self.begun.append(call)
        plan = self._plans.find(call.plan, call.plan_digest)
        assert plan is not None, "the learner sends the plan first"
        if self._group is None:
            self._epoch = WeightEpoch(self._epoch.number + 1, call.store_host, call.store_port, 2)
        self._receiving = asyncio.ensure_future(asyncio.to_thread(self._receive, plan, self._epoch))
        await self._hold()
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
            self._leave_group()
            return weights.publish_outcome_to_proto(PublishOutcome(False, "as the test wants", (), 0.0))
        step = next(begun.step for begun in reversed(self.begun) if begun.version == call.version)
        await self._ledger.record_version(call.version, step)
        self._serving = call.version, step  # the worker serves a version before the version's slots are released
        await self._ledger.release_slots(step)
        self.committed.append(number)
        self.has_committed.set()
        self.heartbeat = Heartbeat(RunState.RUNNING, call.version)
        return weights.publish_outcome_to_proto(PublishOutcome(True, "", ("rollout-0",), 0.01))

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

    async def work(self) -> None:
        """Act as the worker until cancelled: make groups that are newly opened, or that wait again after a resume."""
        while True:
            if self._serving is not None and not self.is_idle:
                await self._make_groups()
            await asyncio.sleep(0.02)

    async def _make_groups(self) -> None:
        """Fill the slots as a fast worker would. The content of a group depends on its prompt alone."""
        assert self._serving is not None
        num_wanted = min(self._num_groups, (self._serving[1] + 1 + self.max_staleness) * GROUPS_PER_BATCH)
        await self._ledger.open_groups([PromptId("train", 0, index) for index in range(num_wanted)])
        num_slots = (1 + self.max_staleness) * GROUPS_PER_BATCH
        while rows := await self._ledger.lease("rollout-0", 100.0, num_wanted, num_slots):
            # The lease may be younger than a commit that this round began before.
            version = self._serving[0]
            if self.claimed_version is not None:
                version = PolicyVersion(0, self.claimed_version)
            for row in rows:
                index = row.prompt_id.index
                (group,) = random_groups(1, 4, seed=index, first_prompt=index, version=version)
                await self._ledger.commit(group, row.fencing_token)
        if num_wanted == self._num_groups and not await self._ledger.is_closed():
            await self._ledger.close()

    async def ReportStep(self, request: pb.ReportStepRequest, context: Any) -> pb.ReportStepResponse:
        call = control.report_step_from_proto(request)
        if call.is_last:
            self.heartbeat = Heartbeat(RunState.FINISHED, call.version)
        answer = await super().ReportStep(request, context)
        await self._hold()
        return answer

    async def _hold(self) -> None:
        """Hold an answer back for ever where the test wants that: the learner is killed meanwhile."""
        if self.holds_when is not None and self.holds_when(self):
            self.holds.set()
            await asyncio.Event().wait()


class Learner:
    """The learner's process, and the mesh around it.

    Attributes:
        process: the process, which with several ranks is their launcher; None before `start`.
    """

    def __init__(self, mesh: Mesh, ledger: CoordinatorLedger, config: MeshConfig, file: Path) -> None:
        self.mesh, self.ledger, self.config = mesh, ledger, config
        self.process: asyncio.subprocess.Process | None = None
        self._file = file

    async def start(self) -> None:
        """Start the process, for the first time or after an earlier process has ended."""
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "rollmesh.cli", "learner", "--config", str(self._file)),
            cwd=REPOSITORY,
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )

    async def ended(self) -> tuple[int, str]:
        """Wait for the end of the process. Return its exit code and its stderr."""
        assert self.process is not None
        _, stderr = await asyncio.wait_for(self.process.communicate(), DEADLINE_S)
        assert self.process.returncode is not None
        return self.process.returncode, stderr.decode()

    async def kill(self) -> None:
        """Kill all ranks at once, as the machine does when its memory is full."""
        if self.process is not None and self.process.returncode is None:
            launcher = psutil.Process(self.process.pid)
            for process in (*launcher.children(recursive=True), launcher):  # every rank has its own session
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            await self.process.communicate()


@asynccontextmanager
async def learner_process(folder: Path, num_groups: int, **sections: dict[str, Any]) -> AsyncIterator[Learner]:
    """Yield a started learner in its mesh. ``sections`` replace settings of the tiny model's configuration."""
    # The path of a socket has to be short, and pytest's folders have long paths.
    with EmbeddedRedis.start(folder / "redis") as server:
        redis = connect(server.url, 5.0)
        ledger = CoordinatorLedger(redis, "learner-test", term=0)
        mesh = Mesh(ledger, num_groups)
        async with mesh.serve() as coordinator:
            config = mesh_config(
                write_tiny_model(folder / "model"),
                folder,
                replay={"url": server.url},
                coordinator={"address": coordinator.address},
                **sections,
            )
            mesh.max_staleness = config.training.max_staleness
            file = folder / "mesh.yaml"
            file.write_text(dump_mesh(config), encoding="utf-8")
            learner = Learner(mesh, ledger, config, file)
            try:
                async with Supervisor() as tasks:
                    tasks.spawn(mesh.work(), "worker")
                    await learner.start()
                    yield learner
            finally:
                await learner.kill()
                await redis.aclose()
