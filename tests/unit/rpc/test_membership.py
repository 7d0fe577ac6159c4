"""A member stays one through everything that a coordinator may go through, and learns how the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rollmesh.aio.awake import boot_time
from rollmesh.errors import (
    ConfigError,
    DeadlineError,
    InvalidArgumentError,
    RunEndedError,
    StartAgainError,
    SupersededError,
    UnavailableError,
)
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.membership import Membership
from rollmesh.types import Heartbeat, MemberReport, PolicyVersion, Role, RunState
from tests.fakes.coordinator import FakeCoordinator
from tests.fakes.waiting import run_bounded, until


def member(client: CoordinatorClient, **options: Any) -> Membership:
    return Membership(client, "sums", Role.ROLLOUT, "127.0.0.1:7", 2, **options)


@contextlib.asynccontextmanager
async def joined(fake: FakeCoordinator, **options: Any) -> AsyncIterator[Membership]:
    """Serves the coordinator, with one member of it."""
    async with (
        fake.serve() as server,
        CoordinatorClient(server.address, "rollout-0") as client,
        member(client, **options) as membership,
    ):
        yield membership


def test_a_member_registers_beats_and_leaves() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.heartbeat = Heartbeat(RunState.RUNNING, PolicyVersion(0, 3))
        async with joined(fake, report=lambda: MemberReport(num_generated_tokens=1234)) as membership:
            assert membership.registration == fake.registration
            await until(lambda: len(fake.heartbeats) >= 3)
            assert membership.run_state is RunState.RUNNING
            assert membership.committed_version == PolicyVersion(0, 3)
        (call,) = fake.registered
        assert (call.run_id, call.role, call.address, call.num_weight_ranks) == ("sums", Role.ROLLOUT, "127.0.0.1:7", 2)
        assert fake.heartbeats[0].report.num_generated_tokens == 1234
        assert [left.failure for left in fake.left] == [""]

    run_bounded(test())


def test_no_heartbeat_follows_the_leaving() -> None:
    async def test() -> None:
        fake = FakeCoordinator(heartbeat_interval_s=0.001)
        async with joined(fake) as membership:
            await until(lambda: fake.heartbeats)
            await membership.leave()
            num_heartbeats = fake.num_calls["Heartbeat"]
            await asyncio.sleep(0.05)
            assert fake.num_calls["Heartbeat"] == num_heartbeats
            assert not fake.incarnations
        assert fake.num_calls["Leave"] == 1

    run_bounded(test())


def test_registering_waits_for_a_coordinator_that_starts_later() -> None:
    async def test() -> None:
        async with FakeCoordinator().serve() as server:
            address = server.address
        fake = FakeCoordinator()

        async def start_later() -> None:
            await asyncio.sleep(0.3)
            async with fake.serve(address):
                await until(lambda: fake.left)

        later = asyncio.create_task(start_later())
        async with CoordinatorClient(address, "rollout-0") as client, member(client):
            assert fake.registered
        await later

    run_bounded(test())


def test_registering_gives_up_when_its_time_is_over() -> None:
    async def test() -> None:
        async with FakeCoordinator().serve() as server:
            address = server.address
        started = time.monotonic()
        async with CoordinatorClient(address, "rollout-0") as client:
            with pytest.raises(UnavailableError, match=address):
                await member(client, register_timeout_s=0.5).__aenter__()
        assert time.monotonic() - started < 15

    run_bounded(test())


def test_a_coordinator_of_another_run_is_refused_at_once() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.fail_next("Register", InvalidArgumentError("run_id 'sums' is not this run 'products'", "run_id"))
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0") as client:
            with pytest.raises(InvalidArgumentError, match="products"):
                await member(client).__aenter__()
        assert fake.num_calls["Register"] == 1

    run_bounded(test())


def test_a_repeated_registration_is_the_same_incarnation() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.fail_next("Register", UnavailableError("starting"), UnavailableError("starting", retry_after_s=0.05))
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0") as client, member(client):
            await client.register("sums", Role.ROLLOUT, "127.0.0.1:7")
        assert len({call.caller for call in fake.registered}) == 1
        assert fake.num_calls["Register"] == 4

    run_bounded(test())


def test_two_starts_of_one_member_have_different_incarnations() -> None:
    async def test() -> None:
        first, second = (CoordinatorClient("127.0.0.1:1", "rollout-0") for _ in range(2))
        assert first.caller != second.caller
        await first.close()
        await second.close()

    run_bounded(test())


def test_a_member_that_the_coordinator_forgot_registers_again() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with joined(fake):
            await until(lambda: fake.heartbeats)
            fake.incarnations.clear()
            num_heartbeats = len(fake.heartbeats)
            await until(lambda: len(fake.heartbeats) > num_heartbeats)
        assert len(fake.registered) == 2

    run_bounded(test())


def test_a_member_survives_a_restart_of_the_coordinator() -> None:
    async def test() -> None:
        old, new = FakeCoordinator(), FakeCoordinator()
        new.heartbeat = Heartbeat(RunState.RUNNING, PolicyVersion(0, 9))
        async with old.serve() as server:
            address = server.address
            client = CoordinatorClient(address, "rollout-0")
            membership = await member(client).__aenter__()
            await until(lambda: old.heartbeats)
        await asyncio.sleep(0.2)
        async with new.serve(address):
            await until(lambda: new.heartbeats)
            await until(lambda: membership.committed_version == PolicyVersion(0, 9))
            await membership.leave()
            await client.close()
        assert new.registered[0].caller == old.registered[0].caller
        assert [call.failure for call in new.left] == [""]

    run_bounded(test())


def test_a_coordinator_lost_for_too_long_is_an_error_of_the_owner() -> None:
    async def test() -> None:
        fake = FakeCoordinator(member_timeout_s=0.4)
        async with fake.serve() as server:
            client = CoordinatorClient(server.address, "rollout-0")
            membership = await member(client).__aenter__()
            await until(lambda: fake.heartbeats)
        with pytest.raises(UnavailableError) as caught:
            await membership.wait_over()
        silent = re.search(r"no answer for ([0-9.]+) s", str(caught.value))
        assert silent is not None
        assert float(silent[1]) >= 0.4
        await membership.leave("coordinator lost")
        await client.close()

    run_bounded(test())


def test_what_this_process_slept_through_is_no_silence_of_the_coordinator() -> None:
    async def test() -> None:
        slept_s = 0.0
        fake = FakeCoordinator(member_timeout_s=2.0)
        async with joined(fake, clock=lambda: boot_time() + slept_s) as membership:
            await until(lambda: fake.heartbeats)
            for _ in range(3):
                fake.fail_next("Heartbeat", DeadlineError("the deadline passed while nobody ran"))
                slept_s += 3600.0
                num_heartbeats = len(fake.heartbeats)
                await until(lambda: len(fake.heartbeats) > num_heartbeats + 1)  # noqa: B023
            assert membership.run_state is RunState.RUNNING
        assert fake.num_calls["Register"] == 1

    run_bounded(test())


def test_a_member_keeps_to_the_interval_that_it_is_told() -> None:
    async def test() -> None:
        fake = FakeCoordinator(heartbeat_interval_s=60.0)
        fake.heartbeat = Heartbeat(RunState.RUNNING, None, interval_s=0.01)
        async with joined(fake):
            await until(lambda: len(fake.heartbeats) >= 3)

    run_bounded(test())


def test_single_missed_heartbeats_do_no_harm() -> None:
    async def test() -> None:
        fake = FakeCoordinator(member_timeout_s=0.5)
        fake.fail_next("Heartbeat", *(DeadlineError("busy") for _ in range(3)))
        async with joined(fake) as membership:
            await until(lambda: len(fake.heartbeats) > 2)
            assert membership.run_state is RunState.RUNNING
        assert fake.num_calls["Register"] == 1

    run_bounded(test())


@pytest.mark.parametrize(
    "last", [Heartbeat(RunState.FINISHED, PolicyVersion(0, 60)), Heartbeat(RunState.FAILED, None, "reward: gone")]
)
def test_the_end_of_the_run_reaches_the_owner(last: Heartbeat) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with joined(fake) as membership:
            waiting = asyncio.create_task(membership.wait_over())
            await until(lambda: len(fake.heartbeats) > 2)
            assert not waiting.done()
            fake.heartbeat = last
            assert await waiting == last == await membership.wait_over()
            assert membership.run_state.is_over
            assert membership.failure == last.failure
            num_heartbeats = len(fake.heartbeats)
            await until(lambda: len(fake.heartbeats) > num_heartbeats)

    run_bounded(test())


def test_a_coordinator_may_go_once_the_run_is_over() -> None:
    async def test() -> None:
        fake = FakeCoordinator(member_timeout_s=0.1)
        fake.heartbeat = Heartbeat(RunState.FINISHED, PolicyVersion(0, 60))
        async with fake.serve() as server:
            client = CoordinatorClient(server.address, "rollout-0")
            membership = await member(client).__aenter__()
            await membership.wait_over()
        await asyncio.sleep(0.4)
        assert (await membership.wait_over()).run_state is RunState.FINISHED
        await membership.leave()
        await client.close()

    run_bounded(test())


@pytest.mark.parametrize("error", [SupersededError("another incarnation"), RunEndedError("the run is over")])
def test_a_lasting_refusal_of_the_heartbeats_reaches_the_owner(error: Exception) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with joined(fake) as membership:
            await until(lambda: fake.heartbeats)
            fake.fail_next("Heartbeat", error)  # type: ignore[arg-type]
            with pytest.raises(type(error)):
                await membership.wait_over()

    run_bounded(test())


def test_a_defect_in_the_token_counter_reaches_the_owner() -> None:
    async def test() -> None:
        fake = FakeCoordinator()

        def broken() -> int:
            raise ZeroDivisionError

        async with joined(fake, report=broken) as membership:
            with pytest.raises(ZeroDivisionError):
                await membership.wait_over()

    run_bounded(test())


def test_a_cancelled_waiter_does_not_end_the_waiting_of_others() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with joined(fake) as membership:
            first = asyncio.create_task(membership.wait_over())
            second = asyncio.create_task(membership.wait_over())
            await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.wait({first})
            fake.heartbeat = Heartbeat(RunState.FINISHED, None)
            assert await second == fake.heartbeat

    run_bounded(test())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("no\nmemory"), "ValueError: no memory"),
        (ConfigError("model.path", "'x' is missing", "name a folder"), "model.path: 'x' is missing; name a folder"),
        (AssertionError(), "AssertionError:"),
        (RunEndedError("the run is over"), ""),
        (asyncio.CancelledError(), ""),
    ],
)
def test_the_coordinator_is_told_why_a_member_failed(error: BaseException, sentence: str) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0") as client:
            with pytest.raises(type(error)):
                async with member(client):
                    raise error
        assert [call.failure for call in fake.left] == [sentence]

    run_bounded(test())


def test_only_the_first_leaving_counts() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0") as client:
            with pytest.raises(ValueError, match="later"):  # noqa: PT012
                async with member(client) as membership:
                    await membership.leave("out of memory")
                    raise ValueError("later")
        assert [call.failure for call in fake.left] == ["out of memory"]

    run_bounded(test())


@pytest.mark.parametrize(("error", "is_replaceable"), [(StartAgainError("it died"), True), (ValueError("bad"), False)])
def test_the_coordinator_is_told_whether_a_new_process_may_take_the_place(
    error: Exception, is_replaceable: bool
) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with fake.serve() as server, CoordinatorClient(server.address, "rollout-0") as client:
            with pytest.raises(type(error)):
                async with member(client):
                    raise error
        assert [call.is_replaceable for call in fake.left] == [is_replaceable]

    run_bounded(test())
