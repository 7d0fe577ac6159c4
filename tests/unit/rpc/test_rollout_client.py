"""The coordinator's calls of a worker carry the weight protocol's nouns and are never repeated behind its back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rollmesh.errors import DeadlineError, InvalidArgumentError, SupersededError, UnavailableError, WeightTransferError
from rollmesh.rpc.rollout_client import RolloutClient
from rollmesh.rpc.server import Server
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport
from rollmesh.v1.rollout_pb2_grpc import add_RolloutServiceServicer_to_server
from rollmesh.wire.weights import encode_plan
from tests.contract.examples import EPOCH, PLAN
from tests.fakes.rollout import FakeRollout
from tests.fakes.waiting import run_bounded, until

VERSION = PolicyVersion(0, 1)
ENCODED = encode_plan(PLAN)


def serve(fake: FakeRollout) -> Server:
    service = (add_RolloutServiceServicer_to_server, fake)
    return Server("127.0.0.1:0", {"rollmesh.v1.RolloutService": service}, grace_s=0.0)


@contextlib.asynccontextmanager
async def serving(fake: FakeRollout) -> AsyncIterator[RolloutClient]:
    async with serve(fake) as server, RolloutClient(server.address) as client:
        yield client


_CALLS: dict[str, Callable[[RolloutClient, float], Awaitable[object]]] = {
    "prepare": lambda client, timeout_s: client.prepare(VERSION, ENCODED, EPOCH, 1, 5.0, timeout_s=timeout_s),
    "receive": lambda client, timeout_s: client.receive(VERSION, timeout_s=timeout_s),
    "commit": lambda client, timeout_s: client.commit(VERSION, timeout_s=timeout_s),
}


def test_a_version_goes_through_all_its_steps() -> None:
    async def test() -> None:
        fake = FakeRollout(num_ranks=2)
        async with serving(fake) as client:
            await client.prepare(VERSION, ENCODED, EPOCH, 2, 5.0, timeout_s=5)
            received = await client.receive(VERSION, timeout_s=5)
            committed = await client.commit(VERSION, timeout_s=5)
            await client.abort(VERSION, "too late")
            status = await client.status()
        assert fake.steps() == ["prepare", "receive", "commit", "abort"]
        assert (fake.epochs, fake.ranks) == ([EPOCH], [2])
        assert received == ReceiveReport((fake.digest,) * 2, 1024, 0.01)
        assert committed == CommitReport(0.02, 0.01)
        assert status.version == VERSION

    run_bounded(test())


@pytest.mark.parametrize("step", _CALLS)
@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("busy"),
        SupersededError("0.2 is in preparation"),
        WeightTransferError("peer gone"),
        InvalidArgumentError("no such tensor", "plan.tensors[0].name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_worker_arrives_after_one_try(
    step: str, error: UnavailableError | SupersededError | WeightTransferError | InvalidArgumentError
) -> None:
    async def test() -> None:
        fake = FakeRollout(failures={step: error})
        async with serving(fake) as client:
            with pytest.raises(type(error), match=str(error)):
                await _CALLS[step](client, 5)
        assert fake.steps() == [step]

    run_bounded(test())


@pytest.mark.parametrize("step", _CALLS)
def test_a_worker_that_hangs_costs_the_timeout(step: str) -> None:
    async def test() -> None:
        fake = FakeRollout(gates={step: asyncio.Event()})
        async with serving(fake) as client:
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                await _CALLS[step](client, 0.3)
            assert 0.2 < time.monotonic() - started < 20

    run_bounded(test())


@pytest.mark.parametrize("step", _CALLS)
def test_a_worker_that_died_is_noticed_at_once(step: str) -> None:
    async def test() -> None:
        fake = FakeRollout(gates={step: asyncio.Event()})
        async with serve(fake) as server:
            client = RolloutClient(server.address)
            calling = asyncio.ensure_future(_CALLS[step](client, 60))
            await until(lambda: fake.calls)
            died_at = time.monotonic()
        with pytest.raises(UnavailableError):
            await calling
        assert time.monotonic() - died_at < 20
        await client.close()

    run_bounded(test())


def test_a_plan_is_sent_once_and_named_from_then_on() -> None:
    async def test() -> None:
        fake = FakeRollout()
        async with serving(fake) as client:
            for _ in range(3):
                await client.prepare(VERSION, ENCODED, EPOCH, 1, 5.0, timeout_s=5)
        assert fake.plans == [PLAN, None, None]

    run_bounded(test())


def test_a_worker_that_does_not_hold_the_plan_gets_it_again() -> None:
    async def test() -> None:
        fake = FakeRollout()
        async with serving(fake) as client:
            await client.prepare(VERSION, ENCODED, EPOCH, 1, 5.0, timeout_s=5)
            fake.forget_plan()
            await client.prepare(VERSION, ENCODED, EPOCH, 1, 5.0, timeout_s=5)
        assert fake.plans == [PLAN, None, PLAN]
        assert fake.steps() == ["prepare", "prepare"]

    run_bounded(test())


def test_a_plan_that_was_refused_is_sent_again() -> None:
    async def test() -> None:
        fake = FakeRollout(failures={"prepare": InvalidArgumentError("no such tensor", "plan")})
        async with serving(fake) as client:
            for _ in range(2):
                with pytest.raises(InvalidArgumentError):
                    await client.prepare(VERSION, ENCODED, EPOCH, 1, 5.0, timeout_s=5)
        assert fake.plans == [PLAN, PLAN]

    run_bounded(test())
