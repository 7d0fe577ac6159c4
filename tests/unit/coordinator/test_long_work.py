"""Long work lives: leases are renewed by heartbeats, and a run moves as long as its members' work does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from rollmesh.aio.awake import AwakeClock
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.types import GroupState, LearnerPhase, Lease, MemberReport, RunState
from services.coordinator.watch import Watch
from tests.unit.coordinator.harness import Mesh, Worker, evaluation_sample, evaluation_section


def report(*leases: Lease, num_moves: int = 0) -> MemberReport:
    return MemberReport(num_moves=num_moves, renewals=tuple(lease.key for lease in leases))


async def seconds_left(mesh: Mesh, lease: Lease) -> float:
    return (await mesh.ledger.seconds_left([lease.group_id]))[lease.group_id]


def test_a_lease_that_heartbeats_renew_does_not_expire(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        kept, left_alone = await worker.take(2)
        worker.stream.grant(1)
        again = asyncio.create_task(worker.lease())
        for _ in range(5):
            assert (await worker.client.heartbeat(report(kept))).ended == ()
            await mesh.age(0.5, kept, left_alone)
            await mesh.watch.tick()
        assert (await again).group_id == left_alone.group_id
        assert await mesh.commit(kept) is CommitOutcome.ACCEPTED

    with_worker(body, coordinator={"lease_ttl_s": 2.0})


def test_a_worker_is_told_that_a_lease_it_renews_is_over(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        over, kept = await worker.take(2)
        await mesh.ledger.give_back(over.group_id, over.fencing_token, "elsewhere")
        ended: list[str] = []
        async with asyncio.timeout(30):
            while not ended:
                ended.extend(key.group_id for key in (await worker.client.heartbeat(report(over, kept))).ended)
        assert ended == [over.group_id]

    with_worker(body)


def test_evaluation_leases_are_renewed_as_well(tmp_path: Path, with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        (held,) = await worker.take(1)
        evaluator = mesh.coordinator.evaluator
        assert evaluator is not None
        (item,) = evaluator.leases_of("rollout-0")
        item.deadline_s -= 100.0
        assert (await worker.client.heartbeat(report(held))).ended == ()
        assert 299 < evaluator.seconds_left(item) <= 300
        evaluator.report(held.group_id, held.fencing_token, [evaluation_sample(1.0)])
        assert (await worker.client.heartbeat(report(held))).ended == (held.key,)

    with_worker(body, evaluation=evaluation_section(tmp_path, num_rows=2))


def test_a_lease_that_is_repeated_has_the_time_that_is_left_of_it(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        lost, over = await worker.take(2)
        member = mesh.coordinator.members.get("rollout-0")
        assert member is not None
        keys = Keys(mesh.config.run.name)
        await mesh.ledger._redis.zincrby(keys.deadlines, -200_000, lost.group_id)
        mesh.ledger.expire_leases = lambda **_: asyncio.sleep(0, [])  # type: ignore[method-assign, assignment]
        await mesh.ledger._redis.zincrby(keys.deadlines, -400_000, over.group_id)
        await worker.stream.close()
        async with worker.client.lease_stream() as stream:
            stream.grant(2)
            async with asyncio.timeout(30):
                again = await anext(aiter(stream))
        assert (again.group_id, again.fencing_token) == (lost.group_id, lost.fencing_token)
        assert 80 < again.ttl_s <= 100

    with_worker(body)


class Stall:
    """A watch of its own over a running mesh, on virtual time."""

    def __init__(self, mesh: Mesh, stall_timeout_s: float = 600.0) -> None:
        self.now = 0.0
        self.mesh = mesh
        self._watch = Watch(mesh.coordinator, mesh.ledger, 1.0, 10, stall_timeout_s, AwakeClock(1e6, lambda: self.now))

    async def after(self, seconds: float) -> RunState:
        self.now += seconds
        await self._watch.tick()
        return self.mesh.coordinator.run.state


async def standing_still(mesh: Mesh, worker: Worker) -> Stall:
    """A mesh in which all groups that may be leased are, and the coordinator has seen it."""
    await mesh.publish(0)
    await worker.take(2)

    def is_settled() -> bool:
        snapshot = mesh.coordinator.dispatcher.snapshot
        return snapshot is not None and snapshot.num_groups[GroupState.LEASED] == 2

    await mesh.until(is_settled)
    return Stall(mesh)


@pytest.mark.parametrize("phase", [LearnerPhase.TRAINING, LearnerPhase.CHECKPOINTING])
def test_a_phase_longer_than_the_stall_timeout_goes_on_as_long_as_it_moves(
    with_worker: Callable[..., None], phase: LearnerPhase
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        stall = await standing_still(mesh, worker)
        for number in range(10):
            await mesh.learner.heartbeat(MemberReport(num_moves=number, phase=phase))
            assert await stall.after(500.0) is RunState.RUNNING
        assert await stall.after(500.0) is RunState.RUNNING
        assert await stall.after(100.0) is RunState.FAILED

    with_worker(body)


def test_one_sample_longer_than_the_stall_timeout_moves_by_its_tokens(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        stall = await standing_still(mesh, worker)
        for number in range(10):
            await worker.client.heartbeat(MemberReport(num_generated_tokens=10_000 + number, num_moves=number))
            assert await stall.after(500.0) is RunState.RUNNING

    with_worker(body)


def test_what_shows_no_sign_gets_the_patience_that_it_asks_for_and_no_more(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        stall = await standing_still(mesh, worker)
        await mesh.learner.heartbeat(MemberReport(patience_s=1800.0, phase=LearnerPhase.CHECKPOINTING))
        assert await stall.after(0.0) is RunState.RUNNING
        assert await stall.after(1799.0) is RunState.RUNNING
        assert await stall.after(1.0) is RunState.FAILED
        failure = mesh.coordinator.run.failure
        assert failure == "nothing has moved for 1800 s: the mesh waits for the learner to write a checkpoint"

    with_worker(body)
