"""Retries are bounded, paced, and steered by the server."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rollmesh.errors import DeadlineError, InvalidArgumentError, RollMeshError, SupersededError, UnavailableError
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.retry import Backoff, call_unary, retry
from rollmesh.rpc.server import Server
from rollmesh.v1 import reward_pb2, reward_pb2_grpc

QUICK = Backoff(initial_s=0.01, maximum_s=0.02)


class Attempts:
    """Fails with each error in turn, then answers; records when it was called and with how much time."""

    def __init__(self, *errors: RollMeshError) -> None:
        self.errors = list(errors)
        self.times: list[float] = []
        self.allowed: list[float] = []

    async def __call__(self, left_s: float) -> str:
        self.times.append(time.monotonic())
        self.allowed.append(left_s)
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_failures_that_may_pass_are_tried_again() -> None:
    attempts = Attempts(UnavailableError("a"), DeadlineError("b"), UnavailableError("c"))
    assert asyncio.run(retry(attempts, timeout_s=5, backoff=QUICK)) == "answer"
    assert len(attempts.times) == 4


@pytest.mark.parametrize("error", [InvalidArgumentError("no"), SupersededError("old"), RollMeshError("broken")])
def test_failures_that_stay_are_raised_at_once(error: RollMeshError) -> None:
    attempts = Attempts(error)
    with pytest.raises(type(error)):
        asyncio.run(retry(attempts, timeout_s=5, backoff=QUICK))
    assert len(attempts.times) == 1


def test_the_caller_may_end_the_tries() -> None:
    attempts = Attempts(UnavailableError("a"), UnavailableError("b"), UnavailableError("c"))
    with pytest.raises(UnavailableError, match="b"):
        asyncio.run(retry(attempts, timeout_s=5, backoff=QUICK, should_retry=lambda error: str(error) == "a"))
    assert len(attempts.times) == 2


def test_the_last_error_is_raised_when_the_time_is_up() -> None:
    attempts = Attempts(*(UnavailableError(str(n)) for n in range(1000)))
    begin = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(retry(attempts, timeout_s=1.0, backoff=QUICK))
    assert time.monotonic() - begin < 15
    assert str(caught.value) == str(len(attempts.times) - 1)
    assert len(attempts.times) > 2


def test_a_last_try_that_is_cut_short_does_not_hide_why_those_before_it_failed() -> None:
    cut_short = (DeadlineError("no time") for _ in range(1000))
    attempts = Attempts(UnavailableError("starting", retry_after_s=0.5), *cut_short)
    with pytest.raises(UnavailableError, match="starting"):
        asyncio.run(retry(attempts, timeout_s=1.4, backoff=QUICK))
    assert len(attempts.times) > 1


def test_a_try_that_had_time_enough_says_more_than_those_before_it() -> None:
    attempts = Attempts(UnavailableError("starting"), DeadlineError("no answer"))
    with pytest.raises(DeadlineError, match="no answer"):
        asyncio.run(retry(attempts, timeout_s=20, backoff=Backoff(initial_s=0.02, maximum_s=1000, factor=5000)))


def test_the_server_can_ask_for_a_longer_pause() -> None:
    attempts = Attempts(UnavailableError("busy", retry_after_s=0.3))
    asyncio.run(retry(attempts, timeout_s=5, backoff=QUICK))
    assert attempts.times[1] - attempts.times[0] >= 0.29


def test_a_pause_that_outlasts_the_deadline_is_not_begun() -> None:
    attempts = Attempts(UnavailableError("busy", retry_after_s=60))
    begin = time.monotonic()
    with pytest.raises(UnavailableError):
        asyncio.run(retry(attempts, timeout_s=20, backoff=QUICK))
    assert time.monotonic() - begin < 10
    assert len(attempts.times) == 1


def test_every_try_is_told_how_long_it_may_take() -> None:
    attempts = Attempts(UnavailableError("a", retry_after_s=0.8))
    asyncio.run(retry(attempts, timeout_s=5.0, attempt_timeout_s=4.5, backoff=QUICK))
    assert attempts.allowed[0] == pytest.approx(4.5)
    assert attempts.allowed[1] <= 4.2 + 1e-6


def test_pauses_grow_to_the_maximum_and_are_shortened_by_half_at_most() -> None:
    pauses = list(itertools.islice(Backoff(initial_s=1, maximum_s=5, factor=2).pauses(), 6))
    for pause, full in zip(pauses, [1, 2, 4, 5, 5, 5], strict=True):
        assert full / 2 <= pause <= full


class Stumbling(reward_pb2_grpc.RewardServiceServicer):
    """Is unavailable twice; then answers."""

    def __init__(self, fail: Callable[[int], Awaitable[None]]) -> None:
        self.num_calls = 0
        self.fail = fail

    async def GetRewardInfo(self, request: Any, context: Any) -> reward_pb2.GetRewardInfoResponse:
        self.num_calls += 1
        await self.fail(self.num_calls)
        return reward_pb2.GetRewardInfoResponse(name=f"try {self.num_calls}")


def call(fail: Callable[[int], Awaitable[None]], **options: Any) -> str:
    async def main() -> str:
        services = {"rollmesh.v1.RewardService": (reward_pb2_grpc.add_RewardServiceServicer_to_server, Stumbling(fail))}
        async with Server("127.0.0.1:0", services, grace_s=0.1) as server, open_channel(server.address) as channel:
            method = reward_pb2_grpc.RewardServiceStub(channel).GetRewardInfo  # type: ignore[no-untyped-call]
            request = reward_pb2.GetRewardInfoRequest()
            name: str = (await call_unary(method, request, peer="reward", backoff=QUICK, **options)).name
            return name

    return asyncio.run(main())


def test_a_unary_call_is_repeated_until_the_server_is_ready() -> None:
    async def fail(num_calls: int) -> None:
        if num_calls < 3:
            raise UnavailableError("not yet")

    assert call(fail, timeout_s=10) == "try 3"


def test_a_try_that_hangs_is_given_up_for_another() -> None:
    async def fail(num_calls: int) -> None:
        if num_calls == 1:
            await asyncio.sleep(60)

    assert call(fail, timeout_s=20, attempt_timeout_s=1.0) == "try 2"


def test_a_server_that_starts_late_is_waited_for() -> None:
    async def main() -> str:
        async def fail(num_calls: int) -> None:
            return None

        services = {"rollmesh.v1.RewardService": (reward_pb2_grpc.add_RewardServiceServicer_to_server, Stumbling(fail))}
        async with Server("127.0.0.1:0", services) as server:
            address = server.address
        async with open_channel(address) as channel:
            method = reward_pb2_grpc.RewardServiceStub(channel).GetRewardInfo  # type: ignore[no-untyped-call]
            answer = asyncio.create_task(call_unary(method, reward_pb2.GetRewardInfoRequest(), timeout_s=20))
            await asyncio.sleep(0.3)
            assert not answer.done()
            async with Server(address, services):
                name: str = (await answer).name
                return name

    assert asyncio.run(main()) == "try 1"
