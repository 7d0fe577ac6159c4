"""A whole coordinator on loopback: real Redis, real gRPC, real clients; fake rollout servicers and no engine."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rollmesh.aio.awake import AwakeClock, boot_time
from rollmesh.aio.supervisor import Supervisor
from rollmesh.config import validate
from rollmesh.data.datasets import open_dataset
from rollmesh.replay.batches import Batch, BatchQueue
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.lease_stream import LeaseStream
from rollmesh.rpc.server import Server
from rollmesh.types import (
    Announcement,
    EvaluationSample,
    Group,
    Lease,
    LeaseKind,
    PolicyVersion,
    PublishOutcome,
    Registration,
    Role,
    Sample,
    Score,
    StopReason,
    TensorSpec,
    Turn,
    VersionSpan,
    WeightPlan,
)
from rollmesh.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from rollmesh.v1.rollout_pb2_grpc import add_RolloutServiceServicer_to_server
from services.config import MeshConfig
from services.coordinator.coordinator import Coordinator
from services.coordinator.main import build, restore
from services.coordinator.prompts import EVAL, TRAIN, HeldOut
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.watch import ASLEEP_S, CLOCK_S, Watch
from tests.fakes.rollout import FakeRollout

PLAN = WeightPlan((TensorSpec("weight", "float32", (4,)),), (0,), b"\x22" * 32)
DIGEST = b"\x11" * 32
WAIT_S = 30.0

_run_numbers = itertools.count()


def mesh_config(folder: Path, redis_url: str, num_rows: int = 100, **sections: dict[str, Any]) -> MeshConfig:
    """Two prompts in a batch, two samples in a group, synchronous; ``sections`` are laid over it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"input": f"prompt {i}", "label": i}) + "\n" for i in range(num_rows)))
    tree: dict[str, Any] = {
        "run": {"name": f"run-{next(_run_numbers)}", "directory": str(folder / "runs"), "seed": 7},
        "model": {"path": str(folder), "max_length": 64},
        "data": {"path": str(data), "label_key": "label"},
        "training": {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 2, "max_staleness": 0},
        "sampling": {"max_new_tokens": 16},
        "coordinator": {"address": "127.0.0.1:1", "heartbeat_interval_s": 0.2, "member_timeout_s": 30.0},
        "rollout": {"start_timeout_s": 20.0},
        "reward": {"address": "127.0.0.1:1"},
        "replay": {"url": redis_url},
        "weights": {"prepare_timeout_s": 20.0, "commit_timeout_s": 20.0, "transfer_timeout_s": 20.0},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return validate(MeshConfig, tree)


def evaluation_section(folder: Path, num_rows: int = 3, **values: Any) -> dict[str, Any]:
    data = folder / "heldout.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"input": f"held out {i}", "label": i}) + "\n" for i in range(num_rows)))
    return {"data": {"path": str(data), "label_key": "label"}, "every_steps": 1, **values}


@dataclass
class Worker:
    """A rollout worker without an engine: its client, its lease stream, and its servicer."""

    name: str
    client: CoordinatorClient
    servicer: FakeRollout
    address: str
    stream: LeaseStream
    leases: AsyncIterator[Lease] = field(init=False)

    def __post_init__(self) -> None:
        self.leases = aiter(self.stream)

    async def lease(self) -> Lease:
        """The next lease; fails the test if none comes."""
        async with asyncio.timeout(WAIT_S):
            return await anext(self.leases)

    async def take(self, count: int) -> list[Lease]:
        self.stream.grant(count)
        return [await self.lease() for _ in range(count)]

    async def gets_nothing(self, for_s: float = 0.4) -> bool:
        """Whether no lease comes for a while."""
        try:
            async with asyncio.timeout(for_s):
                await anext(self.leases)
        except TimeoutError:
            return True
        return False


@dataclass
class Nap:
    """The machine's time, in which the coordinator may have slept for ``seconds``."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return boot_time() + self.seconds


class Mesh:
    """The coordinator under test, and the ways to act on it."""

    def __init__(
        self,
        config: MeshConfig,
        address: str,
        coordinator: Coordinator,
        watch: Watch,
        ledger: CoordinatorLedger,
        nap: Nap,
    ) -> None:
        self.config = config
        self.address = address
        self.coordinator = coordinator
        self.watch = watch
        self.ledger = ledger
        self.nap = nap
        self.stack = AsyncExitStack()
        self.learner = CoordinatorClient(address, "learner")
        assert config.replay.url is not None
        self.queue = BatchQueue(connect_blocking(config.replay.url, 5.0), config.run.name)

    async def join_learner(self) -> None:
        await self.learner.register(self.config.run.name, Role.LEARNER, "127.0.0.1:1")

    async def restart_learner(self) -> Registration:
        """Replace the learner by another process, without a word of the old one."""
        self.learner = await self.stack.enter_async_context(CoordinatorClient(self.address, "learner"))
        return await self.learner.register(self.config.run.name, Role.LEARNER, "127.0.0.1:1")

    async def join(
        self,
        name: str = "rollout-0",
        incarnation: str | None = None,
        serving: PolicyVersion | None = None,
        **behaviour: Any,
    ) -> Worker:
        """Register a worker whose servicer behaves as told."""
        servicer = FakeRollout(**behaviour)
        service = {"rollmesh.v1.RolloutService": (add_RolloutServiceServicer_to_server, servicer)}
        server = await self.stack.enter_async_context(Server("127.0.0.1:0", service, grace_s=0.1))
        client = await self.stack.enter_async_context(CoordinatorClient(self.address, name, incarnation))
        await client.register(self.config.run.name, Role.ROLLOUT, server.address, servicer.num_ranks, serving)
        stream = await self.stack.enter_async_context(client.lease_stream())
        return Worker(name, client, servicer, server.address, stream)

    async def begin(self, number: int, timeout_s: float = WAIT_S, step: int | None = None) -> Any:
        """Announce a version; as in a run without a resume, the step that made it has its number."""
        step = number if step is None else step
        announcement = Announcement(PolicyVersion(0, number), step, PLAN, "127.0.0.1", 29500, 2 * WAIT_S)
        return await self.learner.begin_publish(announcement, timeout_s=timeout_s)

    async def publish_version(self, version: PolicyVersion, step: int) -> PublishOutcome:
        """Publish a version of any lineage."""
        announcement = Announcement(version, step, PLAN, "127.0.0.1", 29500, 2 * WAIT_S)
        await self.learner.begin_publish(announcement, timeout_s=WAIT_S)
        return await self.learner.finish_publish(version, DIGEST, timeout_s=WAIT_S)

    async def finish(self, number: int, digest: bytes = DIGEST, failure: str = "") -> PublishOutcome:
        return await self.learner.finish_publish(PolicyVersion(0, number), digest, failure, timeout_s=WAIT_S)

    async def publish(self, number: int, timeout_s: float = WAIT_S, step: int | None = None) -> PublishOutcome:
        await self.begin(number, timeout_s, step)
        return await self.finish(number)

    async def commit(self, lease: Lease, version: int = 0) -> CommitOutcome:
        """The worker's commit of a finished group."""
        return await self.ledger.commit(group_of(lease, version), lease.fencing_token)

    async def train(self, step: int) -> Batch:
        """The learner's step: take a batch and mark it trained."""
        batch = await asyncio.to_thread(self.queue.take_batch, step, self.config.training.prompts_per_step, 1, WAIT_S)
        assert batch is not None
        await asyncio.to_thread(self.queue.mark_trained, step)
        return batch

    async def pass_time(self, seconds: float) -> None:
        """Move the coordinator's clock on, in steps that are too short for a sleep, with a tick of the watch at each.

        Leases of the ledger are on the clock of Redis: see `age`.
        """
        end_s = self.nap.seconds + seconds
        while self.nap.seconds < end_s:
            self.nap.seconds = min(end_s, self.nap.seconds + CLOCK_S)
            await self.watch.tick()

    async def age(self, seconds: float, *leases: Lease) -> None:
        """Move the deadlines of leases ``seconds`` nearer, as if so much time had passed in Redis."""
        deadlines = Keys(self.config.run.name).deadlines
        for lease in leases:
            await self.ledger._redis.zadd(deadlines, {lease.group_id: -1000 * seconds}, xx=True, incr=True)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that the coordinator does by itself; fails the test if it does not."""
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 (what changes has no event)
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running_mesh(config: MeshConfig) -> AsyncIterator[Mesh]:
    """A coordinator that serves, with a learner and no worker yet.

    A second mesh with the same configuration is one whose coordinator was started again.
    """
    assert config.replay.url is not None
    redis = connect(config.replay.url, 5.0)
    ledger = CoordinatorLedger(redis, config.run.name, max_attempts=config.coordinator.max_attempts, term=0)
    section = config.evaluation
    held_out = None if section is None else HeldOut(open_dataset(section.data, EVAL), section)
    nap = Nap()
    clock = AwakeClock(ASLEEP_S, nap)
    coordinator, watch = build(config, ledger, open_dataset(config.data, TRAIN), held_out, clock)
    await restore(coordinator, ledger)
    service = {
        "rollmesh.v1.CoordinatorService": (add_CoordinatorServiceServicer_to_server, CoordinatorServicer(coordinator))
    }
    try:
        async with Server("127.0.0.1:0", service, grace_s=0.1) as server, Supervisor() as tasks:
            tasks.spawn(coordinator.dispatcher.run(), "dispatcher")
            tasks.spawn(watch.run(), "watch")
            mesh = Mesh(config, server.address, coordinator, watch, ledger, nap)
            async with mesh.stack, mesh.learner:
                await mesh.join_learner()
                yield mesh
            coordinator.dispatcher.close_all()
            await coordinator.publish_driver.close()
    finally:
        await redis.aclose()


def group_of(lease: Lease, version: int = 0) -> Group:
    """A finished group for a lease."""
    samples = tuple(
        Sample(
            sample_id=f"{lease.group_id}/{index}/{lease.attempt}",
            index=index,
            prompt_id=lease.prompt_id,
            prompt_token_ids=np.arange(3, dtype=np.int32),
            response_token_ids=np.arange(5, dtype=np.int32),
            turns=(Turn(5, 0, StopReason.STOP),),
            behaviour_logprobs=np.zeros(5, dtype=np.float32),
            version_spans=(VersionSpan(PolicyVersion(0, version), 0, 5),),
            score=Score(float(index), float(index)),
        )
        for index in range(lease.num_samples)
    )
    return Group(lease.group_id, lease.prompt_id, lease.sequence, lease.attempt, samples)


def evaluation_sample(score: float, version: int = 0, stop: StopReason = StopReason.STOP) -> EvaluationSample:
    return EvaluationSample(score, score, 10, stop, PolicyVersion(0, version), PolicyVersion(0, version))


def is_training(lease: Lease) -> bool:
    return lease.kind is LeaseKind.TRAIN


async def work_through(mesh: Mesh, worker: Worker, steps: int, batch: int, is_all: bool = True) -> list[list[str]]:
    """Synchronous steps: each one's groups are produced, trained and published; returns the batches' group ids."""
    batches = []
    for step in range(1, steps + 1):
        for lease in await worker.take(batch):
            assert await mesh.commit(lease, step - 1) is CommitOutcome.ACCEPTED
        taken = await mesh.train(step)
        batches.append([row.group_id for row in taken.rows])
        assert (await mesh.publish(step)).is_committed
        await mesh.learner.report_step(step, PolicyVersion(0, step), {"reward/mean": 0.5}, is_all and step == steps)
    return batches
