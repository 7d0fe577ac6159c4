"""Many calls over one stream: answers find their calls, and nothing hangs or leaks whatever the peer does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from rollmesh.errors import DeadlineError, InvalidArgumentError, RollMeshError, UnavailableError
from rollmesh.rpc.channel import open_channel
from rollmesh.rpc.multiplex import StreamCaller
from rollmesh.rpc.retry import Backoff
from rollmesh.rpc.server import Server
from rollmesh.v1 import reward_pb2, reward_pb2_grpc
from rollmesh.wire.limits import MAX_MESSAGE_BYTES
from tests.fakes.waiting import until

Request, Response = reward_pb2.ScoreRequest, reward_pb2.ScoreResponse
Caller = StreamCaller[Any, Any]
Behaviour = Callable[[AsyncIterator[Any], Any], Awaitable[None]]
QUICK = Backoff(initial_s=0.02, maximum_s=0.1)


class Scripted(reward_pb2_grpc.RewardServiceServicer):
    """Serves each stream with the next of its behaviours; the last one serves all further streams."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.behaviours = list(behaviours)
        self.num_streams = 0

    async def Score(self, requests: Any, context: Any) -> None:
        behaviour = self.behaviours[min(self.num_streams, len(self.behaviours) - 1)]
        self.num_streams += 1
        await behaviour(requests, context)


def answer_to(request: Any) -> Any:
    return Response(request_id=request.request_id, score=reward_pb2.Score(extra_logs={"n": float(request.query_text)}))


async def echo(requests: AsyncIterator[Any], context: Any) -> None:
    async for request in requests:
        await context.write(answer_to(request))


async def shuffle(requests: AsyncIterator[Any], context: Any) -> None:
    """Answers after a random time, in any order; ends when all are answered."""

    async def answer(request: Any) -> None:
        await asyncio.sleep(random.uniform(0, 0.02))
        await context.write(answer_to(request))

    async with asyncio.TaskGroup() as group:
        async for request in requests:
            group.create_task(answer(request))


async def swallow(requests: AsyncIterator[Any], context: Any) -> None:
    """Answers 0, which shows that the stream stands, and nothing else."""
    async for request in requests:
        if request.query_text == "0":
            await context.write(answer_to(request))


async def take_one_and_fail(requests: AsyncIterator[Any], context: Any) -> None:
    async for _ in requests:
        raise UnavailableError("restarting")


async def take_one_and_end(requests: AsyncIterator[Any], context: Any) -> None:
    async for _ in requests:
        return


@contextlib.asynccontextmanager
async def open_caller(servicer: Any, **options: Any) -> AsyncIterator[Caller]:
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    async with (
        Server("127.0.0.1:0", {"rollmesh.v1.RewardService": (add, servicer)}, grace_s=0.2) as server,
        open_channel(server.address) as channel,
        make_caller(channel, **options) as caller,
    ):
        yield caller


def make_caller(channel: Any, **options: Any) -> Caller:
    method = reward_pb2_grpc.RewardServiceStub(channel).Score  # type: ignore[no-untyped-call]
    return StreamCaller(method, peer="reward", **{"backoff": QUICK, **options})


async def ask(caller: Caller, number: int, timeout_s: float = 10) -> int:
    answer = await caller.call(lambda request_id: Request(request_id=request_id, query_text=str(number)), timeout_s)
    return int(answer.score.extra_logs["n"])


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` and demand that no task of a caller is left, and no error goes unseen by the loop."""

    async def checked() -> None:
        unseen: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        await main()
        await asyncio.sleep(0)
        gc.collect()  # Errors that nobody saw are reported when their futures go.
        left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().endswith("reward")]
        assert left == []
        assert unseen == []

    asyncio.run(asyncio.wait_for(checked(), 60))


def test_every_call_gets_its_own_answer_whatever_the_order() -> None:
    async def main() -> None:
        servicer = Scripted(shuffle)
        async with open_caller(servicer, max_in_flight=64) as caller:
            answers = await asyncio.gather(*(ask(caller, n) for n in range(500)))
            assert answers == list(range(500))
            assert servicer.num_streams == 1
            assert caller.num_in_flight == 0

    run(main)


def test_no_more_than_max_in_flight_are_unanswered() -> None:
    seen: list[int] = []

    async def count(requests: AsyncIterator[Any], context: Any) -> None:
        async for request in requests:
            seen.append(int(request.query_text))
            await asyncio.sleep(0.005)
            if len(seen) % 5 == 0:
                # Five are here; a sixth would have come by now.
                await asyncio.sleep(0.1)
                assert len(seen) % 5 == 0
                for number in seen[-5:]:
                    await context.write(answers[number])

    answers: dict[int, Any] = {}

    async def main() -> None:
        async with open_caller(Scripted(count), max_in_flight=5) as caller:

            async def one(number: int) -> None:
                def build(request_id: str) -> Any:
                    request = Request(request_id=request_id, query_text=str(number))
                    answers[number] = answer_to(request)
                    assert caller.num_in_flight < 5
                    return request

                await caller.call(build, 10)

            await asyncio.gather(*(one(n) for n in range(20)))

    run(main)
    assert seen == list(range(20))


def test_a_peer_that_never_answers_is_a_deadline_and_frees_the_place() -> None:
    async def main() -> None:
        async with open_caller(Scripted(swallow), max_in_flight=1) as caller:
            await ask(caller, 0)
            for _ in range(3):
                with pytest.raises(DeadlineError, match=r"reward: no answer within 0\.1 s"):
                    await ask(caller, 1, timeout_s=0.1)
            assert caller.num_in_flight == 0
            await caller.close(timeout_s=0.5)

    run(main)


def test_an_answer_that_comes_too_late_reaches_nobody() -> None:
    async def late(requests: AsyncIterator[Any], context: Any) -> None:
        await context.write(answer_to(await anext(requests)))
        first = await anext(requests)
        second = await anext(requests)
        await context.write(answer_to(first))
        await context.write(answer_to(second))
        await echo(requests, context)

    async def main() -> None:
        async with open_caller(Scripted(late)) as caller:
            assert await ask(caller, 0) == 0
            with pytest.raises(DeadlineError):
                await ask(caller, 1, timeout_s=0.2)
            assert await ask(caller, 2) == 2
            assert await ask(caller, 3) == 3

    run(main)


def test_answers_to_unknown_ids_and_second_answers_are_ignored() -> None:
    async def babble(requests: AsyncIterator[Any], context: Any) -> None:
        async for request in requests:
            await context.write(Response(request_id="nobody"))
            await context.write(Response())
            await context.write(answer_to(request))
            await context.write(Response(request_id=request.request_id))

    async def main() -> None:
        async with open_caller(Scripted(babble)) as caller:
            assert await asyncio.gather(*(ask(caller, n) for n in range(10))) == list(range(10))

    run(main)


@pytest.mark.parametrize("breaking", [take_one_and_fail, take_one_and_end])
def test_a_broken_stream_fails_what_it_carried_and_the_next_one_serves(breaking: Behaviour) -> None:
    async def main() -> None:
        servicer = Scripted(breaking, echo)
        async with open_caller(servicer) as caller:
            with pytest.raises(UnavailableError, match="reward"):
                await ask(caller, 1)
            assert await ask(caller, 2) == 2
            assert servicer.num_streams == 2

    run(main)


def test_every_call_in_flight_hears_of_a_broken_stream() -> None:
    async def take_ten_and_fail(requests: AsyncIterator[Any], context: Any) -> None:
        for _ in range(10):
            await anext(requests)
        raise UnavailableError("restarting", retry_after_s=0.05)

    async def main() -> None:
        async with open_caller(Scripted(take_ten_and_fail, echo)) as caller:
            outcomes = await asyncio.gather(*(ask(caller, n) for n in range(10)), return_exceptions=True)
            assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
            assert len({id(outcome) for outcome in outcomes}) == 10
            assert {getattr(outcome, "retry_after_s", None) for outcome in outcomes} == {0.05}
            assert await ask(caller, 2) == 2

    run(main)


def test_a_server_that_keeps_breaking_is_not_hammered() -> None:
    async def main() -> None:
        servicer = Scripted(take_one_and_fail)
        async with open_caller(servicer, backoff=Backoff(initial_s=0.1, maximum_s=0.2)) as caller:
            end = time.monotonic() + 1.0
            while time.monotonic() < end or servicer.num_streams < 2:
                with contextlib.suppress(UnavailableError):
                    await ask(caller, 1)
        assert 2 <= servicer.num_streams <= 20

    run(main)


def test_calls_made_while_the_server_restarts_wait_for_it() -> None:
    async def main() -> None:
        add = reward_pb2_grpc.add_RewardServiceServicer_to_server
        services = {"rollmesh.v1.RewardService": (add, Scripted(echo))}
        async with Server("127.0.0.1:0", services, grace_s=0.1) as server:
            address = server.address
            channel = open_channel(address)
            caller = make_caller(channel)
            assert await ask(caller, 1) == 1
        await until(lambda: not caller._is_connected)
        waiting = [asyncio.create_task(ask(caller, n, timeout_s=20)) for n in range(5)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
        async with Server(address, services, grace_s=0.1):
            assert await asyncio.gather(*waiting) == list(range(5))
            await caller.close()
            await channel.close()

    run(main)


def test_no_server_at_all_is_unavailable_within_the_timeout() -> None:
    async def main() -> None:
        async with open_channel("127.0.0.1:1") as channel, make_caller(channel) as caller:
            begin = time.monotonic()
            outcomes = await asyncio.gather(*(ask(caller, n, timeout_s=0.3) for n in range(3)), return_exceptions=True)
            assert time.monotonic() - begin < 20
            assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 3
            begin = time.monotonic()
            await caller.close(timeout_s=40)
            assert time.monotonic() - begin < 20

    run(main)


def test_a_call_that_was_over_before_the_connection_is_not_sent_after_all() -> None:
    async def main() -> None:
        servicer = Scripted(echo)
        add = reward_pb2_grpc.add_RewardServiceServicer_to_server
        services = {"rollmesh.v1.RewardService": (add, servicer)}
        async with Server("127.0.0.1:0", services) as server:
            address = server.address
        seen: list[str] = []

        async def record(requests: AsyncIterator[Any], context: Any) -> None:
            async for request in requests:
                seen.append(request.query_text)
                await context.write(answer_to(request))

        servicer.behaviours = [record]
        async with open_channel(address) as channel, make_caller(channel) as caller:
            with pytest.raises(UnavailableError):
                await ask(caller, 1, timeout_s=0.2)
            async with Server(address, services, grace_s=0.1):
                assert await ask(caller, 2) == 2
                await caller.close()
        assert seen == ["2"]

    run(main)


def test_calls_not_yet_written_to_a_broken_stream_go_to_the_next() -> None:
    has_begun, should_break = asyncio.Event(), asyncio.Event()

    async def stall_and_fail(requests: AsyncIterator[Any], context: Any) -> None:
        await anext(requests)
        has_begun.set()
        await should_break.wait()
        raise UnavailableError("restarting")

    async def main() -> None:
        async with open_caller(Scripted(stall_and_fail, echo), max_in_flight=64) as caller:
            text = "9" * (2 * 1024 * 1024)  # Flow control stops the writer after a few of these.
            blocking = [
                asyncio.create_task(caller.call(lambda id_: Request(request_id=id_, query_text=text), 20))
                for _ in range(16)
            ]
            behind = asyncio.create_task(ask(caller, 7, timeout_s=20))
            await asyncio.wait_for(has_begun.wait(), 20)
            await asyncio.sleep(0.2)
            should_break.set()
            assert await behind == 7
            outcomes = await asyncio.gather(*blocking, return_exceptions=True)
            assert isinstance(outcomes[0], UnavailableError)

    run(main)


def test_a_call_cancelled_in_the_moment_of_its_failure_leaves_no_unseen_error() -> None:
    async def main() -> None:
        async with open_caller(Scripted(swallow)) as caller:
            waiting = asyncio.create_task(ask(caller, 1))
            await asyncio.sleep(0.1)
            await caller.close(timeout_s=0.0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(main)


def test_a_peer_that_does_not_offer_the_stream_is_not_called_unavailable() -> None:
    async def main() -> None:
        async with open_caller(reward_pb2_grpc.RewardServiceServicer()) as caller:
            with pytest.raises(RollMeshError, match="UNIMPLEMENTED") as caught:
                await ask(caller, 1)
            assert type(caught.value) is RollMeshError

    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    run(main)


def test_a_cancelled_call_disturbs_no_other() -> None:
    async def main() -> None:
        has_both, release = asyncio.Event(), asyncio.Event()

        async def hold(requests: AsyncIterator[Any], context: Any) -> None:
            held = [await anext(requests), await anext(requests)]
            has_both.set()
            await release.wait()
            for request in held:
                await context.write(answer_to(request))
            await echo(requests, context)

        servicer = Scripted(hold)
        async with open_caller(servicer) as caller:
            doomed, other = asyncio.create_task(ask(caller, 1)), asyncio.create_task(ask(caller, 2))
            await has_both.wait()
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            release.set()
            assert await other == 2
            assert await ask(caller, 3) == 3
            assert servicer.num_streams == 1

    run(main)


def test_a_cancelled_call_that_waits_for_a_place_takes_none() -> None:
    async def main() -> None:
        async with open_caller(Scripted(swallow), max_in_flight=1) as caller:
            await ask(caller, 0)
            first = asyncio.create_task(ask(caller, 1, timeout_s=0.5))
            second = asyncio.create_task(ask(caller, 2))
            await asyncio.sleep(0.1)
            second.cancel()
            await asyncio.wait({first, second})
            assert second.cancelled()
            assert isinstance(first.exception(), DeadlineError)
            with pytest.raises(DeadlineError):
                await ask(caller, 3, timeout_s=0.1)
            await caller.close(timeout_s=0.5)

    run(main)


def test_closing_lets_the_server_answer_what_it_holds_and_end_the_stream() -> None:
    ended: list[str] = []

    async def hold_until_half_closed(requests: AsyncIterator[Any], context: Any) -> None:
        held = [request async for request in requests]
        for request in held:
            await context.write(answer_to(request))
        ended.append("in good order")

    async def main() -> None:
        async with open_caller(Scripted(hold_until_half_closed)) as caller:
            waiting = [asyncio.create_task(ask(caller, n)) for n in range(8)]
            await asyncio.sleep(0.1)
            await caller.close(timeout_s=10)
            assert await asyncio.gather(*waiting) == list(range(8))
            with pytest.raises(UnavailableError, match="closed"):
                await ask(caller, 9)

    run(main)
    assert ended == ["in good order"]


def test_closing_does_not_wait_for_ever() -> None:
    async def never_end(requests: AsyncIterator[Any], context: Any) -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        async with open_caller(Scripted(never_end)) as caller:
            waiting = asyncio.create_task(ask(caller, 1, timeout_s=50))
            await asyncio.sleep(0.2)
            begin = time.monotonic()
            await asyncio.gather(caller.close(timeout_s=0.3), caller.close(timeout_s=0.3))
            assert 0.2 < time.monotonic() - begin < 15
            with pytest.raises(UnavailableError, match="before the answer"):
                await waiting

    run(main)


def test_closing_before_the_first_call_is_harmless() -> None:
    async def main() -> None:
        async with open_caller(Scripted(echo)) as caller:
            await caller.close()
            await caller.close()

    run(main)


def test_a_stalled_peer_is_a_deadline_for_each_call_and_recovers() -> None:
    """The peer stops reading until flow control blocks the writer; then it goes on."""
    resume = asyncio.Event()

    async def stall(requests: AsyncIterator[Any], context: Any) -> None:
        await resume.wait()
        async for request in requests:
            if len(request.query_text) < 10:
                await context.write(answer_to(request))

    async def main() -> None:
        async with open_caller(Scripted(stall), max_in_flight=32) as caller:

            async def send_large() -> None:
                text = "9" * (2 * 1024 * 1024)
                await caller.call(lambda request_id: Request(request_id=request_id, query_text=text), 1.0)

            outcomes = await asyncio.gather(*(send_large() for _ in range(16)), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} <= {DeadlineError, UnavailableError}
            resume.set()
            assert await ask(caller, 5, timeout_s=20) == 5

    run(main)


def test_a_request_above_the_limit_fails_alone() -> None:
    async def main() -> None:
        servicer = Scripted(echo)
        async with open_caller(servicer) as caller:
            assert await ask(caller, 1) == 1
            with pytest.raises(InvalidArgumentError, match="bytes"):
                await caller.call(lambda request_id: Request(query_text="x" * (MAX_MESSAGE_BYTES + 1)), 10)
            assert await ask(caller, 2) == 2
            assert servicer.num_streams == 1
            assert caller.num_in_flight == 0

    run(main)


def test_a_request_that_cannot_be_built_fails_alone() -> None:
    def refuse(request_id: str) -> Any:
        raise ValueError("no such sample")

    async def main() -> None:
        async with open_caller(Scripted(echo), max_in_flight=1) as caller:
            with pytest.raises(ValueError, match="no such sample"):
                await caller.call(refuse, 10)
            assert await ask(caller, 1) == 1

    run(main)


def test_a_defect_in_reading_answers_reaches_the_calls() -> None:
    def misread(response: Any) -> str:
        raise AttributeError("no such field")

    async def main() -> None:
        async with open_caller(Scripted(echo), response_id=misread) as caller:
            for _ in range(2):
                with pytest.raises(AttributeError, match="no such field"):
                    await ask(caller, 1)

    run(main)


def test_calls_survive_a_chaotic_server_when_they_are_repeated() -> None:
    """Streams break at random, answers get lost and doubled; repeated calls all end with their own answer."""
    generator = random.Random(7)

    async def chaos(requests: AsyncIterator[Any], context: Any) -> None:
        async for request in requests:
            dice = generator.random()
            if dice < 0.03:
                raise UnavailableError("crash")
            if dice < 0.05:
                return
            if dice < 0.15:
                continue
            await context.write(answer_to(request))
            if dice > 0.9:
                await context.write(answer_to(request))

    async def main() -> None:
        async with open_caller(Scripted(chaos), max_in_flight=16) as caller:

            async def insist(number: int) -> int:
                while True:
                    with contextlib.suppress(UnavailableError, DeadlineError):
                        return await ask(caller, number, timeout_s=0.2)

            assert await asyncio.gather(*(insist(n) for n in range(150))) == list(range(150))
            assert caller.num_in_flight == 0

    run(main)
