"""A worker with a fake engine joins a run, takes weights, delivers groups, and ends in order in every case."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from rollmesh.errors import ConfigError, RollMeshError, StartAgainError, SupersededError, TaintedError
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.rpc.rollout_client import RolloutClient
from rollmesh.types import (
    GroupState,
    Heartbeat,
    LeaseKind,
    PolicyVersion,
    PromptId,
    RunState,
    TensorSpec,
    WeightEpoch,
)
from rollmesh.weights.plan import build_plan
from rollmesh.wire.weights import encode_plan
from services.config import MeshConfig
from services.rollout.compose import make_worker
from services.rollout.main import worker_index
from tests.fakes.coordinator import FakeCoordinator
from tests.fakes.engine import FakeEngine
from tests.fakes.scorers import FakeReferenceServicer, FakeRewardServicer, reference_server, reward_server
from tests.fakes.waiting import run_bounded, until
from tests.unit.rollout.rig import AsciiTokenizer, lease

V0, V1 = PolicyVersion(0, 0), PolicyVersion(0, 1)
PLAN = build_plan([TensorSpec("w", "float32", (2,))], 1024)
EPOCH = WeightEpoch(1, "127.0.0.1", 1234, 2)


def mesh_config(run_id: str, **sections: dict[str, Any]) -> MeshConfig:
    tree: dict[str, Any] = {
        "run": {"name": run_id},
        "model": {"path": "model", "max_length": 64},
        "data": {"path": "data.jsonl"},
        "evaluation": {"data": {"path": "heldout.jsonl"}},
        "training": {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 2},
        "sampling": {"max_new_tokens": 16},
        "rollout": {"max_open_groups": 2, "scoring_timeout_s": 20.0, "start_timeout_s": 20.0},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return MeshConfig.model_validate(tree)


@dataclass
class Mesh:
    """The worker's task, and the services around the worker."""

    coordinator: FakeCoordinator
    reward: FakeRewardServicer
    reference: FakeReferenceServicer
    ledger: CoordinatorLedger
    engine: FakeEngine
    stop: asyncio.Event
    running: asyncio.Task[int]

    async def lease(self, index: int, **changes: Any) -> None:
        """Open a group, lease it in the ledger, and send the lease."""
        await self.ledger.open_groups([PromptId("train", 0, index)])
        (row,) = await self.ledger.lease("rollout-0", 30.0, 1)
        self.coordinator.leases.put_nowait(lease(index, token=row.fencing_token, **changes))

    async def num_groups(self, state: GroupState) -> int:
        return (await self.ledger.snapshot()).num_groups[state]

    async def until_groups(self, state: GroupState, count: int) -> None:
        async with asyncio.timeout(30.0):
            while True:
                if await self.num_groups(state) >= count:
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_worker(
    url: str, run_id: str, engine: FakeEngine | None = None, **sections: dict[str, Any]
) -> AsyncIterator[Mesh]:
    coordinator, reward, reference = FakeCoordinator(), FakeRewardServicer(), FakeReferenceServicer()
    engine = engine or FakeEngine()
    async with (
        coordinator.serve() as coordinator_server,
        reward_server(reward) as rewards,
        reference_server(reference) as references,
    ):
        sections.setdefault("coordinator", {})["address"] = coordinator_server.address
        sections.setdefault("reward", {})["address"] = rewards.address
        sections.setdefault("reference", {})["address"] = references.address
        sections.setdefault("replay", {})["url"] = url
        config = mesh_config(run_id, **sections)
        redis = connect(url, 5.0)
        stop = asyncio.Event()
        running = asyncio.create_task(
            make_worker(config, "rollout-0", AsciiTokenizer()).run(engine, stop), name="worker"
        )
        mesh = Mesh(coordinator, reward, reference, CoordinatorLedger(redis, run_id, term=0), engine, stop, running)
        try:
            await until(lambda: coordinator.registered or running.done())
            yield mesh
        finally:
            stop.set()
            await asyncio.wait({running}, timeout=30.0)
            assert running.done()
            await redis.aclose()


def test_a_worker_registers_asks_for_its_credits_and_commits_its_groups(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_worker(redis_url, run_id, FakeEngine(num_weight_ranks=2)) as mesh:
            for index in range(5):
                await mesh.lease(index)
            await mesh.until_groups(GroupState.READY, 5)
            (registered,) = mesh.coordinator.registered
            assert registered.num_weight_ranks == 2
            await until(lambda: mesh.coordinator.heartbeats[-1].report.num_generated_tokens == 5 * 2 * 5)
            await until(lambda: sum(mesh.coordinator.grants[0]) == 2 + 5)
            assert mesh.coordinator.grants[0][0] == 2
            async with RolloutClient(registered.address) as client:
                status = await client.status()
            assert (status.version, status.num_groups_committed, status.num_generated_tokens) == (V0, 5, 50)
            assert (status.num_groups_open, status.num_samples_generating, status.num_samples_scoring) == (0, 0, 0)

    run_bounded(scenario())


def test_reference_logprobs_are_asked_for_training_and_not_for_evaluation(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_worker(redis_url, run_id, algorithm={"kl": {"coef": 0.1}}) as mesh:
            await mesh.lease(0)
            mesh.coordinator.leases.put_nowait(lease(3, kind=LeaseKind.EVALUATE))
            await mesh.until_groups(GroupState.READY, 1)
            await until(lambda: mesh.coordinator.evaluations)
            assert len(mesh.reference.calls) == 2
            assert len(mesh.coordinator.evaluations[0].samples) == 2

    run_bounded(scenario())


def test_weights_arrive_while_groups_are_open(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        async with running_worker(redis_url, run_id, engine) as mesh:
            await mesh.lease(0)
            await until(lambda: engine.requests)
            async with RolloutClient(mesh.coordinator.registered[0].address) as client:
                await client.prepare(V1, encode_plan(PLAN), EPOCH, 1, transfer_deadline_s=20.0, timeout_s=20.0)
                with pytest.raises(SupersededError):
                    await client.receive(PolicyVersion(0, 7), timeout_s=5.0)
                assert (await client.receive(V1, timeout_s=20.0)).digests == (b"d" * 32,)
                assert (await client.commit(V1, timeout_s=20.0)).pause_s == pytest.approx(0.02)
                assert (await client.status()).version == V1
            engine.released.set()
            await mesh.until_groups(GroupState.READY, 1)
            row = await mesh.ledger.row("train:0:0")
            assert row is not None
            assert row.oldest_version == V1

    run_bounded(scenario())


def test_a_failed_load_hands_leases_back_and_leaves_with_the_failure(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 30.0, failures={"commit": TaintedError("bad shape")})
        async with running_worker(redis_url, run_id, engine) as mesh:
            await mesh.lease(0)
            await until(lambda: engine.requests)
            async with RolloutClient(mesh.coordinator.registered[0].address) as client:
                await client.prepare(V1, encode_plan(PLAN), EPOCH, 1, transfer_deadline_s=20.0, timeout_s=20.0)
                await client.receive(V1, timeout_s=20.0)
                with pytest.raises(TaintedError, match="bad shape"):
                    await client.commit(V1, timeout_s=20.0)
            with pytest.raises(StartAgainError, match="bad shape"):
                await mesh.running
            (left,) = mesh.coordinator.left
            assert "bad shape" in left.failure
            assert left.is_replaceable
            assert await mesh.num_groups(GroupState.PENDING) == 1
            assert engine.num_running == 0

    run_bounded(scenario())


def test_a_worker_that_is_told_to_stop_hands_back_leaves_in_order_and_succeeds(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(
            delay_s=lambda request: 0.0 if request.request_id.startswith("train:0:0/") else 60.0,
            is_held=lambda request: True,
        )
        async with running_worker(redis_url, run_id, engine) as mesh:
            await mesh.lease(0)
            await mesh.lease(1)
            await until(lambda: len(engine.requests) == 4)
            mesh.stop.set()
            engine.released.set()
            assert await asyncio.wait_for(mesh.running, 25.0) == 0
            assert await mesh.num_groups(GroupState.READY) == 1
            assert await mesh.num_groups(GroupState.PENDING) == 1
            (left,) = mesh.coordinator.left
            assert left.failure == ""

    run_bounded(scenario())


@pytest.mark.parametrize(("state", "exit_code"), [(RunState.FINISHED, 0), (RunState.FAILED, 1)])
def test_the_exit_code_tells_how_the_run_ended(
    redis_url: str, run_id: str, state: RunState, exit_code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 30.0)
        async with running_worker(redis_url, run_id, engine) as mesh:
            await mesh.lease(0)
            await until(lambda: engine.requests)
            mesh.coordinator.heartbeat = Heartbeat(state, V0, "learner: NaN" if exit_code else "")
            clock = asyncio.get_running_loop().time
            began_at = clock()
            assert await asyncio.wait_for(mesh.running, 25.0) == exit_code
            assert clock() - began_at < 25
            assert await mesh.num_groups(GroupState.PENDING) == 1

    with caplog.at_level(logging.ERROR):
        run_bounded(scenario())
    assert ("learner: NaN" in caplog.text) == bool(exit_code)


def test_a_dead_engine_fails_the_worker_and_the_coordinator_is_told(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 0.1, failures={"generate": StartAgainError("vLLM has died")})
        async with running_worker(redis_url, run_id, engine) as mesh:
            await mesh.lease(0)
            with pytest.raises(StartAgainError, match="vLLM has died"):
                await asyncio.wait_for(mesh.running, 20.0)
            assert [(left.failure, left.is_replaceable) for left in mesh.coordinator.left] == [("vLLM has died", True)]
            assert await mesh.num_groups(GroupState.PENDING) == 1

    run_bounded(scenario())


def test_a_worker_whose_engine_dies_while_idle_ends_at_once_and_says_so(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with running_worker(redis_url, run_id, engine) as mesh:
            engine.is_alive = False
            with pytest.raises(StartAgainError, match="vLLM has died"):
                await asyncio.wait_for(asyncio.shield(mesh.running), 20.0)
            (left,) = mesh.coordinator.left
            assert (left.failure, left.is_replaceable) == (engine.explain_death(), True)

    run_bounded(scenario())


def test_a_reward_server_that_never_comes_fails_the_worker_in_time(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.serve() as server, reward_server(FakeRewardServicer()) as gone:
            await gone.stop()
            config = mesh_config(
                run_id,
                coordinator={"address": server.address},
                reward={"address": gone.address},
                replay={"url": redis_url},
                rollout={"start_timeout_s": 0.5},
            )
            worker = make_worker(config, "rollout-0", AsciiTokenizer())
            with pytest.raises(RollMeshError, match="reward server"):
                await worker.run(FakeEngine(), asyncio.Event())
            assert "reward server" in coordinator.left[0].failure
            assert not coordinator.left[0].is_replaceable

    run_bounded(scenario())


def test_a_worker_without_redis_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"replay\.url: is not set"):
        make_worker(
            mesh_config("x", reward={"address": "127.0.0.1:1"}, coordinator={"address": "127.0.0.1:2"}),
            "rollout-0",
            AsciiTokenizer(),
        )


@pytest.mark.parametrize(("name", "index"), [("rollout-0", 0), ("rollout-12", 12), ("rollout", 0), ("a-3-b", 0)])
def test_the_number_of_a_worker_comes_from_its_name(name: str, index: int) -> None:
    assert worker_index(name) == index


def test_a_sample_that_takes_longer_than_its_lease_lives_is_committed(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        sections = {"coordinator": {"lease_ttl_s": 0.5, "heartbeat_interval_s": 0.1, "member_timeout_s": 5.0}}
        async with running_worker(redis_url, run_id, engine, **sections) as mesh:
            await mesh.lease(0, ttl_s=0.5)
            await until(lambda: sum(len(call.report.renewals) for call in mesh.coordinator.heartbeats) >= 5)
            assert await mesh.num_groups(GroupState.LEASED) == 1
            engine.released.set()
            await mesh.until_groups(GroupState.READY, 1)

    run_bounded(scenario())


def test_a_worker_stops_working_on_a_lease_that_is_over(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        async with running_worker(redis_url, run_id, engine) as mesh:
            await mesh.lease(0)
            await until(lambda: engine.num_running == 2)
            mesh.coordinator.heartbeat = Heartbeat(RunState.RUNNING, V0, ended=(lease(0, token=1).key,))
            await until(lambda: len(engine.cancelled) == 2)

    run_bounded(scenario())


def test_a_worker_whose_engine_hangs_hands_back_and_asks_for_a_new_start(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        async with running_worker(redis_url, run_id, engine, coordinator={"stall_timeout_s": 1.0}) as mesh:
            await mesh.lease(0)
            with pytest.raises(StartAgainError, match="the engine has made no token"):
                await asyncio.wait_for(asyncio.shield(mesh.running), 30.0)
            (left,) = mesh.coordinator.left
            assert left.is_replaceable
            assert await mesh.num_groups(GroupState.PENDING) == 1

    run_bounded(scenario())
