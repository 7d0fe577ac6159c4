"""Members and coordinators that die and come back, over real Redis and real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rollmesh.errors import SupersededError, UnknownMemberError, WeightTransferError
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import Lease, PolicyVersion, RunState
from services.config import MeshConfig
from services.coordinator.members import MAX_TRIES
from tests.unit.coordinator.harness import (
    Mesh,
    evaluation_sample,
    evaluation_section,
    is_training,
    mesh_config,
    running_mesh,
    work_through,
)

V0, V1 = PolicyVersion(0, 0), PolicyVersion(0, 1)


@pytest.fixture
def with_mesh(tmp_path: Path, redis_url: str) -> Callable[..., None]:
    def run(*bodies: Callable[[Mesh], Awaitable[None]], **sections: Any) -> None:
        """Run each body in a mesh of its own: its coordinator is the one before, started again."""
        config = mesh_config(tmp_path, redis_url, **sections)

        async def scenario(body: Callable[[Mesh], Awaitable[None]], config: MeshConfig) -> None:
            async with running_mesh(config) as mesh:
                await body(mesh)

        for body in bodies:
            asyncio.run(asyncio.wait_for(scenario(body, config), 60))

    return run


class TestRolloutWorker:
    def test_the_learner_is_asked_to_publish_again_for_a_worker_that_joins(
        self, with_mesh: Callable[..., None]
    ) -> None:
        async def body(mesh: Mesh) -> None:
            first = await mesh.join("rollout-0")
            await mesh.publish(0)
            assert not (await mesh.learner.heartbeat()).should_publish
            joined = await mesh.join("rollout-1")
            assert (await mesh.learner.heartbeat()).should_publish
            assert not (await first.client.heartbeat()).should_publish, "only the learner publishes"
            outcome = await mesh.publish(0)
            assert (outcome.is_committed, outcome.members) == (True, ("rollout-1",))
            assert first.servicer.steps() == ["prepare", "receive", "commit"], "it serves the version already"
            assert not (await mesh.learner.heartbeat()).should_publish
            assert len(await joined.take(2)) == 2
            larger = await mesh.begin(1)
            assert larger.world_size == 3, "the next version goes to both"

        with_mesh(body)

    def test_the_only_worker_may_be_replaced_while_the_learner_waits(self, with_mesh: Callable[..., None]) -> None:
        async def body(mesh: Mesh) -> None:
            killed = await mesh.join("rollout-0")
            await mesh.publish(0)
            held = await killed.take(2)
            new = await mesh.join("rollout-0")
            assert (await mesh.learner.heartbeat()).should_publish
            assert (await mesh.publish(0)).is_committed
            again = await new.take(2)
            assert [lease.group_id for lease in again] == [lease.group_id for lease in held]
            assert await mesh.commit(held[0]) is CommitOutcome.FENCED
            for lease in again:
                assert await mesh.commit(lease) is CommitOutcome.ACCEPTED
            assert [row.group_id for row in (await mesh.train(1)).rows] == [lease.group_id for lease in held]

        with_mesh(body)

    def test_nobody_is_asked_while_a_publish_is_under_way(self, with_mesh: Callable[..., None]) -> None:
        async def body(mesh: Mesh) -> None:
            await mesh.join("rollout-0")
            await mesh.publish(0)
            await mesh.begin(1)
            await mesh.join("rollout-1")
            assert not (await mesh.learner.heartbeat()).should_publish
            assert (await mesh.finish(1)).members == ("rollout-0",)
            assert (await mesh.learner.heartbeat()).should_publish

        with_mesh(body)

    def test_a_worker_that_never_gets_ready_is_not_tried_for_ever(self, with_mesh: Callable[..., None]) -> None:
        async def body(mesh: Mesh) -> None:
            await mesh.join("rollout-0")
            await mesh.publish(0)
            broken = await mesh.join("rollout-1", failures={"prepare": WeightTransferError("it lacks a tensor")})
            while (await mesh.learner.heartbeat()).should_publish:
                with pytest.raises(WeightTransferError, match="it lacks a tensor"):
                    await mesh.begin(0)
                await broken.client.heartbeat()
            assert broken.servicer.steps().count("prepare") == MAX_TRIES
            broken.servicer.failures = {}
            assert (await mesh.publish(1)).members == ("rollout-0", "rollout-1"), "the next version is for all"

        with_mesh(body)

    def test_a_version_that_all_workers_serve_is_not_published_again(self, with_mesh: Callable[..., None]) -> None:
        async def body(mesh: Mesh) -> None:
            await mesh.join("rollout-0")
            await mesh.publish(0)
            with pytest.raises(SupersededError, match=r"version 0\.0 serves already"):
                await mesh.begin(0)
            await mesh.publish(1)
            with pytest.raises(SupersededError, match="cannot be published"):
                await mesh.begin(0)

        with_mesh(body)

    def test_an_evaluation_that_nobody_can_work_on_holds_no_version_back(
        self, with_mesh: Callable[..., None], tmp_path: Path
    ) -> None:
        async def body(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0")
            await mesh.publish(0)
            assert mesh.coordinator.evaluator is not None
            assert mesh.coordinator.evaluator.num_open == 3
            await worker.client.leave()
            await mesh.join("rollout-0")
            assert (await mesh.publish(1)).is_committed

        evaluation = evaluation_section(tmp_path, every_steps=1, should_pin_version=True)
        with_mesh(body, evaluation=evaluation)


class TestLearner:
    def test_the_run_waits_for_a_learner_that_was_killed(self, with_mesh: Callable[..., None]) -> None:
        async def body(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0")
            await mesh.publish(0)
            while mesh.coordinator.members.learner is not None:
                await worker.client.heartbeat()
                await mesh.pass_time(0.5)
            assert mesh.coordinator.run.state is RunState.RUNNING
            assert len(await worker.take(2)) == 2, "generation goes on and fills the slots"
            registration = await mesh.restart_learner()
            assert registration.committed_version == registration.newest_version == V0

        with_mesh(body, coordinator={"member_timeout_s": 3.0})

    def test_the_publish_of_a_learner_that_was_killed_is_given_up_at_once(self, with_mesh: Callable[..., None]) -> None:
        async def body(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", gates={"receive": asyncio.Event()})
            old = mesh.learner
            first = await mesh.begin(0)
            await mesh.until(lambda: "receive" in worker.servicer.steps())
            await mesh.restart_learner()
            assert "abort" in worker.servicer.steps()
            with pytest.raises(UnknownMemberError):
                await old.heartbeat()
            worker.servicer.gates = {}
            second = await mesh.begin(0)
            assert second.number > first.number, "the old group may be half joined"
            assert (await mesh.finish(0)).is_committed

        with_mesh(body)

    def test_a_learner_hears_of_the_version_that_was_committed_after_its_predecessor_died(
        self, with_mesh: Callable[..., None]
    ) -> None:
        async def body(mesh: Mesh) -> None:
            gate = asyncio.Event()
            worker = await mesh.join("rollout-0")
            await mesh.publish(0)
            worker.servicer.gates = {"commit": gate}
            await mesh.begin(1)
            finish = asyncio.create_task(mesh.finish(1))
            await mesh.until(lambda: worker.servicer.steps().count("commit") == 2)
            restart = asyncio.create_task(mesh.restart_learner())
            await asyncio.sleep(0.1)
            assert not restart.done(), "the commit may still succeed"
            gate.set()
            assert (await finish).is_committed
            registration = await restart
            assert registration.committed_version == registration.newest_version == V1

        with_mesh(body)

    def test_a_policy_older_than_the_committed_version_serves_with_a_new_lineage(
        self, with_mesh: Callable[..., None]
    ) -> None:
        async def body(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0")
            await mesh.publish(0)
            await work_through(mesh, worker, steps=2, batch=2, is_all=False)
            await mesh.restart_learner()
            await asyncio.to_thread(mesh.queue.take_over, 1)
            lineage = PolicyVersion(1, 3)
            assert (await mesh.publish_version(lineage, step=1)).is_committed
            assert (mesh.coordinator.run.step, mesh.coordinator.run.committed_version) == (1, lineage)

        with_mesh(body)


def two_groups_leased() -> tuple[list[Lease], Callable[[Mesh], Awaitable[None]]]:
    """Return the body of a mesh whose worker, the process "one" named rollout-0, takes two leases, and those leases."""
    held: list[Lease] = []

    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0", "one")
        await mesh.publish(0)
        held.extend(await worker.take(2))

    return held, body


class TestCoordinator:
    def test_a_worker_goes_on_with_its_leases_and_the_run_ends(self, with_mesh: Callable[..., None]) -> None:
        held, before = two_groups_leased()

        async def after(mesh: Mesh) -> None:
            assert mesh.coordinator.run.state is RunState.RUNNING
            assert (mesh.coordinator.run.committed_version, mesh.coordinator.run.step) == (V0, 0)
            worker = await mesh.join("rollout-0", "one", serving=V0)
            assert not (await mesh.learner.heartbeat()).should_publish
            for lease in held:
                assert await mesh.commit(lease) is CommitOutcome.ACCEPTED
            await mesh.train(1)
            assert (await mesh.publish(1)).is_committed
            for step in (2, 3):
                for lease in await worker.take(2):
                    assert await mesh.commit(lease, step - 1) is CommitOutcome.ACCEPTED
                await mesh.train(step)
                assert (await mesh.publish(step)).is_committed
            await mesh.learner.report_step(3, PolicyVersion(0, 3), {}, True)
            assert (await worker.client.heartbeat()).run_state is RunState.FINISHED

        with_mesh(before, after)

    def test_a_worker_that_came_back_gets_the_leases_again_that_its_stream_may_have_lost(
        self, with_mesh: Callable[..., None]
    ) -> None:
        held, before = two_groups_leased()

        async def after(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", "one", serving=V0)
            repeated = await worker.take(2)
            assert [lease.key for lease in repeated] == [lease.key for lease in held]

        with_mesh(before, after)

    def test_the_leases_of_a_worker_that_was_started_anew_wait_again_at_once(
        self, with_mesh: Callable[..., None]
    ) -> None:
        held, before = two_groups_leased()

        async def after(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", "two")
            assert (await mesh.learner.heartbeat()).should_publish
            assert (await mesh.publish(0)).is_committed
            again = await worker.take(2)
            assert [lease.group_id for lease in again] == [lease.group_id for lease in held]
            assert [lease.attempt for lease in again] == [1, 1]

        with_mesh(before, after, coordinator={"max_attempts": 1})

    def test_the_leases_of_a_worker_that_does_not_come_back_go_to_others(self, with_mesh: Callable[..., None]) -> None:
        held, before = two_groups_leased()

        async def after(mesh: Mesh) -> None:
            other = await mesh.join("rollout-1", "two", serving=V0)
            assert await other.gets_nothing()
            other.stream.grant(2)
            for _ in range(8):
                await asyncio.gather(other.client.heartbeat(), mesh.learner.heartbeat())
                await mesh.pass_time(0.5)
            leases = [await other.lease(), await other.lease()]
            assert [lease.group_id for lease in leases] == [lease.group_id for lease in held]

        with_mesh(before, after, coordinator={"member_timeout_s": 3.0, "max_attempts": 1})

    def test_a_version_that_was_recorded_and_not_loaded_is_published_again(
        self, with_mesh: Callable[..., None]
    ) -> None:
        async def before(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", "one")
            await mesh.publish(0)
            await work_through(mesh, worker, steps=1, batch=2, is_all=False)
            await mesh.ledger.record_version(PolicyVersion(0, 2), 2)

        async def after(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", "one", serving=V1)
            worker.stream.grant(2)
            assert await worker.gets_nothing(), "the version that it serves may be too old"
            assert (await mesh.learner.heartbeat()).should_publish
            assert (await mesh.publish(2)).is_committed

        with_mesh(before, after)

    def test_an_epoch_number_is_never_used_twice(self, with_mesh: Callable[..., None]) -> None:
        numbers = []

        async def body(mesh: Mesh) -> None:
            await mesh.join("rollout-0")
            numbers.append((await mesh.begin(0)).number)

        with_mesh(body, body, body)
        assert numbers == sorted(set(numbers))

    def test_an_evaluation_that_was_under_way_is_made_again_and_counts_once(
        self, with_mesh: Callable[..., None], tmp_path: Path
    ) -> None:
        async def before(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", "one")
            await mesh.publish(0)
            lease = await _evaluation_lease(worker.take)
            await worker.client.report_evaluation(lease.group_id, lease.fencing_token, [evaluation_sample(1.0)])

        async def after(mesh: Mesh) -> None:
            worker = await mesh.join("rollout-0", "one", serving=V0)
            evaluator = mesh.coordinator.evaluator
            assert evaluator is not None
            assert evaluator.num_open == 3, "the round begins anew"
            while evaluator.num_open:
                lease = await _evaluation_lease(worker.take)
                await worker.client.report_evaluation(lease.group_id, lease.fencing_token, [evaluation_sample(1.0)])
            log = mesh.config.run.folder / "evaluations.jsonl"
            assert len(log.read_text().splitlines()) == 1

        with_mesh(before, after, evaluation=evaluation_section(tmp_path, every_steps=100))


async def _evaluation_lease(take: Callable[[int], Awaitable[list[Any]]]) -> Any:
    while is_training(lease := (await take(1))[0]):
        pass
    return lease


def test_a_client_learns_of_a_new_coordinator_by_being_unknown(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        async with CoordinatorClient(mesh.address, "rollout-0", "one") as client:
            with pytest.raises(UnknownMemberError):
                await client.heartbeat()

    with_mesh(body)
