"""Leases arrive as credits allow, through cuts and restarts, and no credit is lost or granted twice."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from rollmesh.errors import RunEndedError, SupersededError, UnavailableError
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.lease_stream import LeaseStream
from rollmesh.types import Lease, LeaseKind, PromptId, SamplingSpec
from tests.fakes.coordinator import FakeCoordinator
from tests.fakes.waiting import run_bounded, until

_LEASE = Lease(
    group_id="train:0:0",
    fencing_token=1,
    kind=LeaseKind.TRAIN,
    prompt_id=PromptId("train", 0, 0),
    sequence=0,
    attempt=0,
    num_samples=2,
    prompt_json='"1+1="',
    label_json="",
    datasource="default",
    sampling=SamplingSpec(1.0, 1.0, 0, 8),
    ttl_s=60.0,
)


def leases(first: int, last: int) -> list[Lease]:
    return [replace(_LEASE, group_id=f"train:0:{i}", sequence=i) for i in range(first, last)]


def offer(fake: FakeCoordinator, items: list[Lease]) -> None:
    for lease in items:
        fake.leases.put_nowait(lease)


@contextlib.asynccontextmanager
async def streaming(fake: FakeCoordinator, **options: Any) -> AsyncIterator[LeaseStream]:
    """Serves the coordinator, with a lease stream of incarnation a1 of the worker."""
    async with fake.serve() as server:
        client = CoordinatorClient(server.address, "rollout-0", "a1")
        async with client, client.lease_stream(**options) as stream:
            yield stream


async def take(stream: LeaseStream, count: int) -> list[int]:
    return [(await asyncio.wait_for(anext(stream), 20)).sequence for _ in range(count)]


def test_no_more_leases_come_than_were_asked_for() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        offer(fake, leases(0, 5))
        async with streaming(fake) as stream:
            stream.grant(2)
            assert await take(stream, 2) == [0, 1]
            assert stream.num_outstanding == 0
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.1)
            stream.grant(1)
            assert await take(stream, 1) == [2]
        assert fake.grants == [[2, 1]]

    run_bounded(test())


def test_a_grant_reaches_the_coordinator_while_the_worker_waits_for_leases() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        offer(fake, leases(0, 3))
        async with streaming(fake) as stream:
            waiting = asyncio.create_task(take(stream, 3))
            await until(lambda: fake.grants)
            stream.grant(1)
            stream.grant(1)
            await until(lambda: sum(fake.grants[0]) == 2)
            stream.grant(1)
            assert await waiting == [0, 1, 2]
        assert sum(fake.grants[0]) == 3

    run_bounded(test())


def test_a_lease_is_not_lost_to_a_cancelled_wait() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        async with streaming(fake) as stream:
            stream.grant(20)
            received = []
            for lease in leases(0, 20):
                waiting = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.002)
                offer(fake, [lease])
                await asyncio.sleep(0.001 * (lease.sequence % 3))
                waiting.cancel()
                try:
                    received.append((await waiting).sequence)
                except asyncio.CancelledError:
                    received += await take(stream, 1)
            assert received == list(range(20))
        assert len(fake.grants) == 1

    run_bounded(test())


def test_a_stream_that_was_cut_comes_back_with_the_outstanding_credits() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        fake.cut_after = 3
        offer(fake, leases(0, 8))
        async with streaming(fake) as stream:
            stream.grant(8)
            assert await take(stream, 8) == list(range(8))
        assert fake.grants == [[8], [5]]

    run_bounded(test())


def test_a_restarted_coordinator_gets_the_outstanding_credits() -> None:
    async def test() -> None:
        old, new = FakeCoordinator(), FakeCoordinator()
        offer(old, leases(0, 2))
        offer(new, leases(2, 6))
        old.incarnations["rollout-0"] = "a1"
        async with old.serve() as server:
            address = server.address
            client = CoordinatorClient(address, "rollout-0", "a1")
            stream = client.lease_stream()
            stream.grant(4)
            assert await take(stream, 2) == [0, 1]
        waiting = asyncio.create_task(take(stream, 4))
        await asyncio.sleep(0.2)
        stream.grant(2)
        async with new.serve(address):
            # Until the heartbeats register the member again the new coordinator does not know it.
            await until(lambda: new.num_calls["Lease"] > 1)
            new.incarnations["rollout-0"] = "a1"
            assert await waiting == [2, 3, 4, 5]
            await stream.close()
        assert sum(new.grants[0]) == 4
        await client.close()

    run_bounded(test())


def test_a_coordinator_that_stays_away_ends_the_iteration_with_an_error() -> None:
    async def test() -> None:
        async with FakeCoordinator().serve() as server:
            address = server.address
        client = CoordinatorClient(address, "rollout-0")
        async with client, client.lease_stream(lost_timeout_s=0.5) as stream:
            started = time.monotonic()
            with pytest.raises(UnavailableError, match="no lease stream for"):
                await anext(stream)
            assert 0.4 < time.monotonic() - started < 15

    run_bounded(test())


def test_a_coordinator_that_keeps_failing_ends_the_iteration_with_its_error() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.fail_next("Lease", *(UnavailableError("starting") for _ in range(100)))
        async with streaming(fake, lost_timeout_s=0.5) as stream:
            with pytest.raises(UnavailableError, match="starting"):
                await anext(stream)
        assert 2 <= fake.num_calls["Lease"] < 12

    run_bounded(test())


def test_a_replaced_worker_is_told_so() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "b2"
        async with streaming(fake) as stream:
            with pytest.raises(SupersededError):
                await anext(stream)

    run_bounded(test())


def test_the_iteration_ends_with_the_run() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        fake.fail_next("Lease", RunEndedError("the run is over"))
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0", "a1") as client:
            assert [lease async for lease in client.lease_stream()] == []

    run_bounded(test())


@pytest.mark.parametrize("state", ["waiting", "writing", "reconnecting", "idle"])
def test_closing_ends_the_iteration_wherever_it_is(state: str) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0", "a1") as client:
            stream = client.lease_stream()
            if state == "reconnecting":
                fake.fail_next("Lease", UnavailableError("later", retry_after_s=30))

            async def consume() -> list[Lease]:
                return [lease async for lease in stream]

            consumer = asyncio.create_task(consume()) if state != "idle" else None
            if state in ("waiting", "reconnecting"):
                await until(lambda: fake.num_calls["Lease"])
                await asyncio.sleep(0.05)
            elif state == "writing":
                await asyncio.sleep(0)
            await stream.close()
            await stream.close()
            if consumer is not None:
                assert await asyncio.wait_for(consumer, 20) == []
            assert await consume() == []

    run_bounded(test())


def test_a_silent_coordinator_is_waited_for() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        async with streaming(fake, lost_timeout_s=0.1) as stream:
            stream.grant(1)
            waiting = asyncio.create_task(take(stream, 1))
            await asyncio.sleep(0.5)
            offer(fake, leases(0, 1))
            assert await waiting == [0]
        assert len(fake.grants) == 1

    run_bounded(test())


def test_a_wait_cancelled_while_connecting_leaves_the_connection_alone() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.incarnations["rollout-0"] = "a1"
        offer(fake, leases(0, 1))
        async with streaming(fake) as stream:
            stream.grant(1)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            await until(lambda: fake.leases.empty())
            assert await take(stream, 1) == [0]
        assert fake.grants == [[1]]

    run_bounded(test())
