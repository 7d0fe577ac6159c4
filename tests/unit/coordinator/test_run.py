"""Leases, admission and the end of the run, over real Redis and real gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollmesh.data.order import permutation
from rollmesh.errors import (
    InvalidArgumentError,
    RunEndedError,
    SupersededError,
    UnavailableError,
    UnknownMemberError,
)
from rollmesh.replay.accounting import account
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.replay.memory import RedisMemory
from rollmesh.types import GroupState, Lease, LeaseKind, MemberReport, PolicyVersion, Registration, Role, RunState
from services.coordinator.waiting import waiting_for
from tests.unit.coordinator.harness import (
    Mesh,
    Worker,
    mesh_config,
    running_mesh,
    work_through,
)


def test_no_lease_is_given_before_a_version_serves(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        worker.stream.grant(2)
        assert await worker.gets_nothing()
        await mesh.publish(0)
        assert (await worker.lease()).sequence == 0

    with_worker(body)


def test_leases_come_in_the_order_of_the_permutation_and_never_beyond_the_credits(
    with_worker: Callable[..., None],
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        leases = await worker.take(2)
        expected = [int(row) for row in permutation(100, 7, 0)[:3]]
        assert [lease.prompt_id.index for lease in leases] == expected[:2]
        assert [lease.sequence for lease in leases] == [0, 1]
        assert json.loads(leases[0].prompt_json) == f"prompt {expected[0]}"
        assert json.loads(leases[0].label_json) == expected[0]
        assert (leases[0].num_samples, leases[0].attempt, leases[0].kind) == (2, 0, LeaseKind.TRAIN)
        assert await worker.gets_nothing()
        assert [lease.sequence for lease in await worker.take(1)] == [2]

    with_worker(body, training={"max_staleness": 1})


def test_admission_never_exceeds_the_slots(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        leases = await worker.take(4)
        worker.stream.grant(50)
        assert await worker.gets_nothing()
        snapshot = await mesh.ledger.snapshot()
        assert (snapshot.num_slots_used, snapshot.num_opened) == (4, 4)
        for lease in leases:
            await mesh.commit(lease)
        await mesh.train(1)
        # Trained is not enough: the slot is free once the version that it made serves.
        assert await worker.gets_nothing()
        await mesh.publish(7, step=1)
        assert [(await worker.lease()).sequence for _ in range(2)] == [4, 5]
        assert (await mesh.ledger.snapshot()).num_slots_used == 4

    with_worker(body, training={"max_staleness": 1})


def test_no_group_is_opened_while_redis_is_short_of_memory(
    with_worker: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        memory = RedisMemory(used_bytes=90 * 1024**2, limit_bytes=100 * 1024**2)

        async def reading() -> RedisMemory:
            return memory

        monkeypatch.setattr(mesh.ledger, "memory", reading)
        await mesh.publish(0)
        worker.stream.grant(1)
        assert await worker.gets_nothing()
        assert "waits for memory in Redis, which uses 90 of 100 MiB" in waiting_for(mesh.coordinator.view())
        memory = RedisMemory(used_bytes=80 * 1024**2, limit_bytes=100 * 1024**2)
        assert (await worker.lease()).sequence == 0

    with_worker(body)


def test_a_run_without_staleness_has_the_batches_of_a_synchronous_loop(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        batches = await work_through(mesh, worker, steps=3, batch=2)
        rows = [int(row) for row in permutation(5, 7, 0)] + [int(row) for row in permutation(5, 7, 1)]
        ids = [f"train:{place // 5}:{row}" for place, row in enumerate(rows)]
        assert batches == [ids[0:2], ids[2:4], ids[4:6]]
        assert mesh.coordinator.run.state is RunState.FINISHED

    with_worker(body, num_rows=5, training={"epochs": 2})


def test_the_run_ends_with_its_last_step_and_tells_everybody(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await work_through(mesh, worker, steps=3, batch=2)
        assert (await worker.client.heartbeat()).run_state is RunState.FINISHED
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(worker.leases), 20)
        with pytest.raises(RunEndedError):
            await worker.client.register(mesh.config.run.name, Role.ROLLOUT, worker.address, 1)
        books = await account(mesh.ledger)
        assert books["num_trained"] == books["num_opened"] == 6
        assert books["is_balanced"]

    with_worker(body)


def test_the_intake_closes_with_a_smaller_last_batch(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        registration = await worker.client.register(mesh.config.run.name, Role.ROLLOUT, worker.address, 1)
        assert registration.num_steps == 2
        await mesh.publish(0)
        await work_through(mesh, worker, steps=1, batch=2, is_all=False)
        await mesh.commit((await worker.take(1))[0], 1)
        last = await mesh.train(2)
        assert (len(last.rows), last.is_last) == (1, True)

    with_worker(body, num_rows=3)


def test_a_failed_group_is_replaced_by_the_next_prompt(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        first, second = await worker.take(2)
        await mesh.ledger.give_back(first.group_id, first.fencing_token, "bad prompt", is_final=True)
        third = (await worker.take(1))[0]
        assert third.sequence == 2
        await mesh.commit(second)
        await mesh.commit(third)
        batch = await mesh.train(1)
        assert [row.sequence for row in batch.rows] == [1, 2]

    with_worker(body)


def test_an_expired_lease_is_given_again_first_and_the_old_holder_is_fenced(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        old, other = await worker.take(2)
        await mesh.commit(other)
        await mesh.age(2.0, old)
        again = (await worker.take(1))[0]
        assert (again.group_id, again.attempt) == (old.group_id, 1)
        assert again.fencing_token > old.fencing_token
        assert await mesh.commit(old) is CommitOutcome.FENCED
        assert await mesh.commit(again) is CommitOutcome.ACCEPTED

    with_worker(body, coordinator={"lease_ttl_s": 2.0})


def test_a_new_incarnation_takes_over_and_gets_what_the_old_one_held(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        old = (await worker.take(1))[0]
        successor = await mesh.join("rollout-0", "another start")
        with pytest.raises(UnknownMemberError):
            await worker.client.heartbeat()
        with pytest.raises(SupersededError, match="another process registered under that name"):
            await worker.client.register(mesh.config.run.name, Role.ROLLOUT, worker.address, 1)
        successor.stream.grant(1)
        assert await successor.gets_nothing(), "it has no weights yet"
        await mesh.publish(1)
        again = await successor.lease()
        assert (again.group_id, again.attempt) == (old.group_id, 1)
        assert await mesh.commit(old) is CommitOutcome.FENCED

    with_worker(body)


def test_a_worker_behind_the_committed_version_waits_unless_lag_is_allowed(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        member = mesh.coordinator.members.get("rollout-0")
        assert member is not None
        mesh.coordinator.run.commit(PolicyVersion(0, 1), 1)
        assert len(await worker.take(1)) == 1
        mesh.coordinator.run.commit(PolicyVersion(0, 2), 2)
        worker.stream.grant(1)
        assert await worker.gets_nothing()

    with_worker(body, coordinator={"max_version_lag": 1})


def test_two_workers_share_what_there_is(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        other = await mesh.join("rollout-1")
        for one in (worker, other):
            one.stream.grant(10)
        firsts = [asyncio.create_task(one.lease()) for one in (worker, other)]
        await mesh.until(lambda: mesh.coordinator.dispatcher.num_lines == 2)
        await mesh.publish(0)
        leases = await asyncio.gather(*firsts)
        leases += await asyncio.gather(worker.lease(), other.lease())
        assert sorted(lease.sequence for lease in leases) == [0, 1, 2, 3]

    with_worker(body, training={"max_staleness": 1}, rollout={"num_workers": 2})


def test_a_lease_that_was_lost_with_its_stream_is_sent_again_on_the_next(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        member = mesh.coordinator.members.get("rollout-0")
        assert member is not None
        line = mesh.coordinator.dispatcher.open_line(member)
        mesh.coordinator.dispatcher.grant(line, 1)
        lost = await asyncio.wait_for(line.next(), 20)
        assert lost is not None
        mesh.coordinator.dispatcher.close_line(line)
        again, other = await worker.take(2)
        assert (again.group_id, again.fencing_token, again.attempt) == (lost.group_id, lost.fencing_token, 0)
        assert other.sequence == 1
        assert await mesh.commit(again) is CommitOutcome.ACCEPTED

    with_worker(body)


def test_a_new_stream_repeats_what_the_worker_holds_within_its_credits(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        held = await worker.take(2)
        worker.stream.grant(1)
        assert await worker.gets_nothing(0.2)
        mesh.coordinator.dispatcher.close_line_of("rollout-0")
        first = await worker.lease()
        assert await worker.gets_nothing(0.2), "there was one credit"
        (second,) = await worker.take(1)
        assert [(lease.group_id, lease.fencing_token) for lease in (first, second)] == [
            (lease.group_id, lease.fencing_token) for lease in held
        ]
        worker.stream.grant(1)
        assert await worker.gets_nothing(0.3), "each is repeated once"
        assert [await mesh.commit(lease) for lease in held] == [CommitOutcome.ACCEPTED] * 2

    with_worker(body)


def test_leases_whose_answer_from_redis_was_lost_reach_their_worker(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        lease, lost = mesh.ledger.lease, []

        async def lease_and_lose_the_answer(*arguments: Any) -> Any:
            rows = await lease(*arguments)
            if not lost:
                lost.extend(rows)
                raise UnavailableError("Redis does not answer")
            return rows

        mesh.ledger.lease = lease_and_lose_the_answer  # type: ignore[method-assign]
        await mesh.publish(0)
        leases = await worker.take(2)
        assert [(each.group_id, each.fencing_token) for each in leases] == [
            (row.group_id, row.fencing_token) for row in lost
        ]

    with_worker(body)


def test_the_cursor_of_a_new_coordinator_continues_from_the_ledger(tmp_path: Path, redis_url: str) -> None:
    config = mesh_config(tmp_path, redis_url, training={"max_staleness": 1})

    async def life(first_version: int) -> list[Lease]:
        async with running_mesh(config) as mesh:
            worker = await mesh.join("rollout-0")
            await mesh.publish(first_version)
            leases = await worker.take(2)
            for lease in leases:
                await mesh.commit(lease, first_version)
            await mesh.until(lambda: mesh.coordinator.dispatcher.snapshot is not None)
            return leases

    async def registration() -> Registration:
        async with running_mesh(config) as mesh:
            return await mesh.learner.register(config.run.name, Role.LEARNER, "127.0.0.1:1")

    first = asyncio.run(asyncio.wait_for(life(0), 60))
    again = asyncio.run(asyncio.wait_for(registration(), 60))
    assert again.committed_version == again.newest_version == PolicyVersion(0, 0)
    second = asyncio.run(asyncio.wait_for(life(1), 60))
    expected = [int(row) for row in permutation(100, 7, 0)[:4]]
    assert [lease.prompt_id.index for lease in first + second] == expected
    assert [lease.sequence for lease in first + second] == [0, 1, 2, 3]


def test_another_runs_member_and_a_stream_of_the_wrong_role_are_refused(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        with pytest.raises(InvalidArgumentError, match="not 'other'") as caught:
            await worker.client.register("other", Role.ROLLOUT, worker.address, 1)
        assert caught.value.field == "run_id"
        async with mesh.learner.lease_stream() as stream:
            stream.grant(1)
            with pytest.raises(InvalidArgumentError, match="only rollout workers lease"):
                await asyncio.wait_for(anext(stream), 20)

    with_worker(body)


def test_seeded_leases_have_a_seed_that_a_retry_repeats(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        first, second = await worker.take(2)
        await mesh.ledger.give_back(first.group_id, first.fencing_token, "again")
        again = (await worker.take(1))[0]
        assert 0 < first.sampling.seed == again.sampling.seed != second.sampling.seed

    with_worker(body, sampling={"is_seeded": True})


def test_the_status_shows_the_mesh_at_a_glance(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await worker.take(1)
        await worker.client.heartbeat(MemberReport(num_generated_tokens=1234))
        await mesh.learner.report_step(1, PolicyVersion(0, 1), {"reward/mean": 0.25}, False)
        status = await mesh.learner.status()
        assert status.run_state is RunState.RUNNING
        assert (status.step, status.num_steps, status.metrics) == (1, 3, {"reward/mean": 0.25})
        assert (status.num_slots, status.num_slots_used, status.num_generated_tokens) == (2, 2, 1234)
        assert status.num_groups[GroupState.LEASED.value] == 1
        rollout, learner = status.members
        assert (rollout.name, rollout.version, rollout.is_serving, rollout.num_leases) == (
            "rollout-0",
            PolicyVersion(0, 0),
            True,
            1,
        )
        assert learner.role is Role.LEARNER

    with_worker(body)
