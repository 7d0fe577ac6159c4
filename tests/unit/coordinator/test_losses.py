"""What happens when members go, groups fail or nothing moves, over real Redis and real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollmesh.errors import DeadlineError, InvalidArgumentError, UnavailableError, UnknownMemberError
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import GroupState, PolicyVersion, Role, RunState
from tests.unit.coordinator.harness import (
    Mesh,
    Worker,
    mesh_config,
    running_mesh,
)


def test_a_silent_worker_is_dropped_and_its_groups_go_to_others(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        other = await mesh.join("rollout-1")
        await mesh.publish(0)
        held = await worker.take(2)
        async with asyncio.timeout(30):
            while mesh.coordinator.members.get("rollout-0") is not None:
                await asyncio.gather(mesh.learner.heartbeat(), other.client.heartbeat())
                await mesh.pass_time(0.5)
            leases = await other.take(2)
        assert [lease.group_id for lease in leases] == [lease.group_id for lease in held]
        with pytest.raises(UnknownMemberError):
            await worker.client.heartbeat()
        await worker.client.register(mesh.config.run.name, Role.ROLLOUT, worker.address, 1)
        member = mesh.coordinator.members.get("rollout-0")
        assert member is not None
        assert member.version == PolicyVersion(0, 0), "its engine has not forgotten what it serves"

    with_worker(body, coordinator={"member_timeout_s": 3.0}, rollout={"num_workers": 2})


def test_a_learner_that_does_not_come_back_fails_the_run_after_the_stall_timeout(
    with_worker: Callable[..., None],
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        async with asyncio.timeout(30):
            while not mesh.coordinator.run.state.is_over:
                await worker.client.heartbeat()
                await mesh.pass_time(0.5)
        failure = (await worker.client.heartbeat()).failure
        assert failure == "nothing has moved for 9 s: the mesh waits for the learner to register"

    with_worker(body, coordinator={"member_timeout_s": 3.0, "stall_timeout_s": 9.0})


def test_a_member_that_fails_ends_the_run_for_all(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await worker.client.leave("the engine died")
        heartbeat = await mesh.learner.heartbeat()
        assert heartbeat.run_state is RunState.FAILED
        assert heartbeat.failure == "rollout-0: the engine died"

    with_worker(body)


def test_a_member_that_can_be_replaced_leaves_a_run_that_goes_on(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        other = await mesh.join("rollout-1")
        await mesh.publish(0)
        (held,) = await worker.take(1)
        await worker.client.leave("the engine died", is_replaceable=True)
        assert (await mesh.learner.heartbeat()).run_state is RunState.RUNNING
        (again,) = await other.take(1)
        assert (again.group_id, again.attempt) == (held.group_id, 1)
        assert mesh.coordinator.members.get("rollout-0") is None

    with_worker(body, coordinator={"max_attempts": 1}, rollout={"num_workers": 2})


async def never(*_: Any, **options: Any) -> Any:
    """What Redis does when it hangs."""
    await asyncio.Event().wait()


def test_a_failure_is_heard_although_redis_hangs(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        mesh.ledger.revoke_member = never  # type: ignore[method-assign]
        with pytest.raises(DeadlineError):
            await worker.client.leave("the engine died", timeout_s=0.5)
        assert (await mesh.learner.heartbeat()).failure == "rollout-0: the engine died"

    with_worker(body)


def test_the_status_is_answered_although_redis_hangs(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await worker.take(1)
        await mesh.learner.status()
        mesh.ledger.snapshot = never  # type: ignore[method-assign]
        status = await mesh.learner.status(timeout_s=4.0)
        assert (status.run_state, status.num_slots_used) == (RunState.RUNNING, 2), "the last figures known"

    with_worker(body)


def test_silent_members_are_dropped_although_redis_is_away(with_worker: Callable[..., None]) -> None:
    async def refuse(*_: Any, **options: Any) -> Any:
        raise UnavailableError("Redis does not answer")

    async def body(mesh: Mesh, worker: Worker) -> None:
        mesh.ledger.expire_leases = mesh.ledger.revoke_member = refuse  # type: ignore[method-assign]
        await mesh.pass_time(3.1)
        assert len(mesh.coordinator.members) == 0

    with_worker(body, coordinator={"member_timeout_s": 3.0})


def test_a_worker_that_leaves_in_good_order_hands_its_groups_on(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        other = await mesh.join("rollout-1")
        await mesh.publish(0)
        held = await worker.take(1)
        await worker.client.leave()
        assert (await other.take(1))[0].group_id == held[0].group_id
        assert mesh.coordinator.run.state is RunState.RUNNING

    with_worker(body, rollout={"num_workers": 2})


def test_a_learner_that_leaves_early_ends_the_run(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.learner.leave()
        assert (await worker.client.heartbeat()).failure == "learner left before its last step"

    with_worker(body)


def test_too_many_failed_groups_end_the_run_naming_the_most_frequent_reason(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        for reason in ("reward_func raised ValueError", "reward_func raised ValueError", "out of tokens"):
            lease = (await worker.take(1))[0]
            await mesh.ledger.give_back(lease.group_id, lease.fencing_token, reason, is_final=True)
        await mesh.until(lambda: mesh.coordinator.run.state.is_over)
        failure = (await worker.client.heartbeat()).failure
        assert failure.startswith("too many groups failed, most often: reward_func raised ValueError (2 of")

    with_worker(body, training={"max_staleness": 1, "prompts_per_step": 3})


def test_a_run_that_stands_still_says_who_waits_for_whom_and_then_fails(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await worker.take(2)
        async with asyncio.timeout(30):
            while not mesh.coordinator.run.state.is_over:
                await mesh.pass_time(0.5)
        failure = (await mesh.learner.heartbeat()).failure
        assert "the learner waits for 2 groups that are leased to rollout-0" in failure
        assert failure.startswith("nothing has moved for")

    with_worker(body, coordinator={"stall_timeout_s": 2.0})


def test_a_row_that_cannot_be_used_fails_its_group_and_the_run_goes_on(tmp_path: Path, redis_url: str) -> None:
    pq.write_table(pa.table({"input": ["fine", "", "as well", "and this"]}), tmp_path / "d.parquet")
    data = {"path": str(tmp_path / "d.parquet"), "label_key": None, "shuffle": False}

    async def scenario() -> None:
        async with running_mesh(mesh_config(tmp_path, redis_url, data=data)) as mesh:
            worker = await mesh.join()
            await mesh.publish(0)
            assert [lease.prompt_id.index for lease in await worker.take(2)] == [0, 2]
            row = await mesh.ledger.row("train:0:1")
            assert row is not None
            assert row.state is GroupState.FAILED
            assert "d.parquet, row 2, input: is empty" in row.reason
            assert mesh.coordinator.run.state is RunState.RUNNING

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_rows_none_of_which_can_be_used_end_the_run_with_the_reason(tmp_path: Path, redis_url: str) -> None:
    pq.write_table(pa.table({"input": ["fine", *[""] * 50]}), tmp_path / "d.parquet")
    data = {"path": str(tmp_path / "d.parquet"), "label_key": None, "shuffle": False}

    async def scenario() -> None:
        async with running_mesh(mesh_config(tmp_path, redis_url, data=data)) as mesh:
            worker = await mesh.join()
            await mesh.publish(0)
            worker.stream.grant(2)
            await worker.lease()
            with pytest.raises(StopAsyncIteration):
                await worker.lease()
            failure = mesh.coordinator.run.failure
            assert failure.startswith("too many groups failed, most often: ")
            assert "input: is empty; take the row out or give it a prompt" in failure

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("name", "address", "refused"),
    [
        ("rollout-0\0train:0:1", "127.0.0.1:1", "name .* has the control character"),
        ("rollout-0\nrollout-1", "127.0.0.1:1", "name .* has the control character"),
        ("rollout-0", "nowhere", "'nowhere' is not an address"),
        ("r" * 1025, "127.0.0.1:1", "name has more than 1024 bytes"),
    ],
)
def test_names_that_cannot_be_told_apart_and_addresses_that_cannot_be_called_are_refused(
    with_worker: Callable[..., None], name: str, address: str, refused: str
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        async with CoordinatorClient(mesh.address, name) as client:
            with pytest.raises(InvalidArgumentError, match=refused):
                await client.register(mesh.config.run.name, Role.ROLLOUT, address)

    with_worker(body)


def test_a_failure_of_any_length_is_told_in_one_short_line(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await worker.client.leave("line\n" * 1_000_000)
        failure = (await mesh.learner.heartbeat()).failure
        assert failure.startswith("rollout-0: line line ")
        assert len(failure) < 2100

    with_worker(body)
