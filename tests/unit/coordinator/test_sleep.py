"""A coordinator that was stopped takes what it slept through for nobody's silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollmesh.errors import UnavailableError
from rollmesh.replay.keys import Keys
from rollmesh.types import GroupState, RunState
from tests.unit.coordinator.harness import Mesh, Worker, evaluation_section

HOUR_S = 3600.0


def test_nobody_is_dropped_and_nothing_is_stalled_after_a_sleep(
    with_worker: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await worker.take(2)
        for _ in range(2):
            mesh.nap.seconds += HOUR_S
            await mesh.watch.tick()
            assert mesh.coordinator.run.state is RunState.RUNNING
            assert [member.name for member in mesh.coordinator.members.all] == ["rollout-0", "learner"]
        sentences = [record.message for record in caplog.records if "was stopped" in record.message]
        assert sentences == ["the coordinator was stopped for 3600 s; all members get their time anew"] * 2

    with_worker(body)


def test_who_stays_silent_after_a_sleep_is_dropped_after_its_whole_timeout(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        mesh.nap.seconds += HOUR_S
        await mesh.watch.tick()
        learner = mesh.coordinator.members.learner
        assert learner is not None
        assert mesh.coordinator.members.heartbeat_age_s(learner) < 1.0
        await mesh.pass_time(3.1)
        assert mesh.coordinator.members.learner is None

    with_worker(body, coordinator={"member_timeout_s": 3.0})


async def refuse() -> None:
    """What Redis does right after the sleep, which has cut its connections."""
    raise UnavailableError("Redis does not answer")


def test_a_lease_that_ended_in_the_sleep_is_over_but_fails_no_group(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        (held,) = await worker.take(1)
        mesh.nap.seconds += HOUR_S
        flush, mesh.coordinator.renewals.flush = mesh.coordinator.renewals.flush, refuse  # type: ignore[method-assign]
        await mesh.ledger._redis.zadd(Keys(mesh.config.run.name).deadlines, {held.group_id: 1})
        await mesh.watch.tick()
        mesh.coordinator.renewals.flush = flush  # type: ignore[method-assign]
        await mesh.watch.tick()
        row = await mesh.ledger.row(held.group_id)
        assert row is not None
        assert (row.state, row.attempt) == (GroupState.PENDING, 1)
        assert await mesh.ledger.renew([(held.group_id, held.fencing_token)], 60.0) == {held.group_id}

    with_worker(body, coordinator={"max_attempts": 1})


def test_evaluation_leases_outlive_a_sleep(tmp_path: Path, with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        (held,) = await worker.take(1)
        mesh.nap.seconds += HOUR_S
        await mesh.watch.tick()
        evaluator = mesh.coordinator.evaluator
        assert evaluator is not None
        (item,) = evaluator.leases_of("rollout-0")
        assert item.fencing_token == held.fencing_token

    with_worker(body, evaluation=evaluation_section(tmp_path, num_rows=2))
