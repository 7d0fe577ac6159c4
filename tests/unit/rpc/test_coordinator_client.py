"""Calls of the coordinator say what they mean, are repeated where that is safe, and end by their deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rollmesh.errors import (
    ConfigError,
    DeadlineError,
    InvalidArgumentError,
    SupersededError,
    UnavailableError,
    UnknownMemberError,
)
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import Announcement, PolicyVersion, PublishOutcome, Role, WeightEpoch
from tests.contract.examples import EVALUATION_SAMPLE, MESH_STATUS, PLAN
from tests.fakes.coordinator import FakeCoordinator
from tests.fakes.waiting import run_bounded, until

VERSION = PolicyVersion(0, 1)
ANNOUNCEMENT = Announcement(VERSION, 3, PLAN, "10.0.0.1", 29500, 12.5)


@contextlib.asynccontextmanager
async def serving(fake: FakeCoordinator) -> AsyncIterator[CoordinatorClient]:
    """Serves the coordinator, with a client that is a member."""
    async with fake.serve() as server, CoordinatorClient(server.address, "learner", "a1") as client:
        fake.incarnations["learner"] = "a1"
        yield client


def test_a_publish_carries_its_plan_and_brings_back_its_outcome() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with serving(fake) as client:
            epoch = await client.begin_publish(ANNOUNCEMENT, timeout_s=5)
            outcome = await client.finish_publish(VERSION, bytes(32), timeout_s=5)
            failed = await client.finish_publish(VERSION, b"", "link down", timeout_s=5)
        assert epoch == WeightEpoch(1, "10.0.0.1", 29500, 3)
        assert outcome == PublishOutcome(True, "", ("rollout-0",), 0.1)
        assert failed == PublishOutcome(False, "link down", (), 0.1)
        (begun,) = fake.begun
        assert (begun.version, begun.plan, begun.transfer_deadline_s) == (VERSION, PLAN, 12.5)
        assert [call.digest for call in fake.finished] == [bytes(32), b""]

    run_bounded(test())


def test_the_coordinator_gets_a_plan_once_and_again_where_it_does_not_hold_it() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with serving(fake) as client:
            await client.begin_publish(ANNOUNCEMENT, timeout_s=5)
            await client.begin_publish(ANNOUNCEMENT, timeout_s=5)
            fake.forget_plan()
            assert await client.begin_publish(ANNOUNCEMENT, timeout_s=5) == WeightEpoch(1, "10.0.0.1", 29500, 3)
        assert [call.plan for call in fake.begun] == [PLAN, None, None, PLAN]
        assert {call.plan_digest for call in fake.begun} == {PLAN.digest}

    run_bounded(test())


def test_reports_arrive_whole() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with serving(fake) as client:
            await client.report_step(7, VERSION, {"reward/mean": 0.5}, is_last=True)
            await client.report_evaluation("eval:0:1", 5, [EVALUATION_SAMPLE])
            await client.report_evaluation("eval:0:2", 6, [], "no reward")
        (step,) = fake.steps
        assert (step.caller, step.step, step.version, step.metrics, step.is_last) == (
            client.caller,
            7,
            VERSION,
            {"reward/mean": 0.5},
            True,
        )
        assert [(call.group_id, call.fencing_token, call.samples, call.failure) for call in fake.evaluations] == [
            ("eval:0:1", 5, (EVALUATION_SAMPLE,), ""),
            ("eval:0:2", 6, (), "no reward"),
        ]

    run_bounded(test())


def test_anybody_may_ask_for_the_status() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.mesh_status = MESH_STATUS
        async with fake.serve() as server, CoordinatorClient(server.address, "cli") as client:
            assert await client.status() == MESH_STATUS

    run_bounded(test())


def test_a_call_goes_through_although_the_coordinator_fails_twice() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.fail_next("ReportStep", UnavailableError("starting"), UnavailableError("starting", retry_after_s=0.2))
        started = time.monotonic()
        async with serving(fake) as client:
            await client.report_step(1, VERSION, {}, is_last=False)
        assert time.monotonic() - started > 0.2
        assert fake.num_calls["ReportStep"] == 3
        assert len(fake.steps) == 1

    run_bounded(test())


def test_a_call_waits_until_a_restarted_coordinator_knows_the_member_again() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with serving(fake) as client:
            fake.incarnations.clear()
            reporting = asyncio.create_task(client.report_step(1, VERSION, {}, is_last=False))
            await until(lambda: fake.num_calls["ReportStep"] >= 2)
            await client.register("sums", Role.LEARNER, "127.0.0.1:7")
            await reporting
        assert len(fake.steps) == 1

    run_bounded(test())


def test_a_member_that_nobody_registers_again_gets_an_error() -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        async with serving(fake) as client:
            fake.incarnations.clear()
            with pytest.raises(UnavailableError, match="learner is not a member") as caught:
                await client.report_step(1, VERSION, {}, is_last=False, timeout_s=2.0)
            assert isinstance(caught.value.__cause__, UnknownMemberError)

    run_bounded(test())


@pytest.mark.parametrize("error", [SupersededError("lease 4 is over"), InvalidArgumentError("bad", "samples")])
def test_what_can_never_succeed_is_tried_once(error: SupersededError | InvalidArgumentError) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.fail_next("ReportEvaluation", error)
        async with serving(fake) as client:
            with pytest.raises(type(error), match=str(error)):
                await client.report_evaluation("eval:0:1", 4, [EVALUATION_SAMPLE])
        assert fake.num_calls["ReportEvaluation"] == 1

    run_bounded(test())


_CALLS: dict[str, Callable[[CoordinatorClient], Awaitable[object]]] = {
    "Register": lambda client: client.register("sums", Role.LEARNER, "127.0.0.1:7", timeout_s=0.3),
    "Heartbeat": lambda client: client.heartbeat(timeout_s=0.3),
    "Leave": lambda client: client.leave(timeout_s=0.3),
    "FailRun": lambda client: client.fail_run("sums", "a process died", timeout_s=0.3),
    "ReportEvaluation": lambda client: client.report_evaluation("g", 1, [EVALUATION_SAMPLE], timeout_s=0.3),
    "BeginPublish": lambda client: client.begin_publish(ANNOUNCEMENT, timeout_s=0.3),
    "FinishPublish": lambda client: client.finish_publish(VERSION, bytes(32), timeout_s=0.3),
    "ReportStep": lambda client: client.report_step(1, VERSION, {}, False, timeout_s=0.3),
    "GetMeshStatus": lambda client: client.status(timeout_s=0.3),
}


@pytest.mark.parametrize("method", _CALLS)
def test_every_call_of_a_frozen_coordinator_ends_by_its_deadline(method: str) -> None:
    async def test() -> None:
        fake = FakeCoordinator()
        fake.stalled.add(method)
        async with serving(fake) as client:
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                await _CALLS[method](client)
            assert time.monotonic() - started < 20

    run_bounded(test())


@pytest.mark.parametrize("method", _CALLS)
def test_every_call_of_an_absent_coordinator_names_it(method: str) -> None:
    async def test() -> None:
        async with FakeCoordinator().serve() as server:
            address = server.address
        async with CoordinatorClient(address, "learner") as client:
            with pytest.raises(UnavailableError, match=f"coordinator at {address}"):
                await _CALLS[method](client)

    run_bounded(test())


def test_a_malformed_address_is_the_configuration_s_fault() -> None:
    async def test() -> None:
        with pytest.raises(ConfigError, match=r"coordinator\.address"):
            CoordinatorClient("localhost", "learner")

    run_bounded(test())
