"""One stream of requests that are answered once each, in any order, with bounds in both directions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rollmesh.errors import InvalidArgumentError
from rollmesh.rpc.responder import answer_stream


class Peer:
    """A client that sends numbers and takes answers; both can be held up."""

    def __init__(self, num_requests: int) -> None:
        self.num_requests = num_requests
        self.num_sent = 0
        self.answers: list[tuple[int, str]] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def requests(self) -> AsyncIterator[int]:
        for number in range(self.num_requests):
            self.num_sent += 1
            yield number
        await self.may_end.wait()

    async def write(self, message: tuple[int, str], /) -> None:
        await self.may_write.wait()
        self.answers.append(message)


class Desk:
    """A servicer whose futures are resolved by hand."""

    def __init__(self) -> None:
        self.futures: dict[int, asyncio.Future[str]] = {}

    async def submit(self, number: int) -> asyncio.Future[str]:
        self.futures[number] = asyncio.get_running_loop().create_future()
        return self.futures[number]


def pair(number: int, outcome: str) -> tuple[int, str]:
    return number, outcome


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await body()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "leaked tasks"

    asyncio.run(bounded())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_answers_go_out_as_they_come_and_the_half_closed_stream_ends_with_the_last() -> None:
    async def body() -> None:
        peer, desk = Peer(3), Desk()
        stream = asyncio.ensure_future(answer_stream(peer.requests(), peer, desk.submit, pair, max_in_flight=8))
        await settle()
        for number in (2, 0):
            desk.futures[number].set_result("x")
            await settle()
        assert peer.answers == [(2, "x"), (0, "x")]
        assert not stream.done()
        desk.futures[1].set_result("last")
        await stream
        assert peer.answers[-1] == (1, "last")

    run(body)


def test_requests_are_read_no_further_than_the_bound() -> None:
    async def body() -> None:
        peer, desk = Peer(10), Desk()
        stream = asyncio.ensure_future(answer_stream(peer.requests(), peer, desk.submit, pair, max_in_flight=3))
        await settle()
        assert set(desk.futures) == {0, 1, 2}
        desk.futures[1].set_result("x")
        await settle()
        assert set(desk.futures) == {0, 1, 2, 3}
        while len(peer.answers) < 10:
            for future in desk.futures.values():
                if not future.done():
                    future.set_result("x")
            await settle()
        await stream
        assert sorted(number for number, _ in peer.answers) == list(range(10))

    run(body)


def test_a_peer_that_takes_no_answers_is_read_no_further() -> None:
    async def body() -> None:
        peer, desk = Peer(100), Desk()
        peer.may_write.clear()
        stream = asyncio.ensure_future(answer_stream(peer.requests(), peer, desk.submit, pair, max_in_flight=3))
        for _ in range(5):
            await settle()
            for future in desk.futures.values():
                if not future.done():
                    future.set_result("x")
        assert len(desk.futures) == 3
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)

    run(body)


def test_a_submission_that_waits_holds_the_reading_back() -> None:
    async def body() -> None:
        peer, room = Peer(5), asyncio.Event()

        async def submit(number: int) -> asyncio.Future[str]:
            await room.wait()
            future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            future.set_result("x")
            return future

        stream = asyncio.ensure_future(answer_stream(peer.requests(), peer, submit, pair, max_in_flight=8))
        await settle()
        assert peer.num_sent == 1
        room.set()
        await stream
        assert peer.answers == [(number, "x") for number in range(5)]

    run(body)


def test_a_broken_stream_cancels_what_is_in_flight() -> None:
    async def body() -> None:
        peer, desk = Peer(3), Desk()
        stream = asyncio.ensure_future(answer_stream(peer.requests(), peer, desk.submit, pair, max_in_flight=8))
        await settle()
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream
        assert all(future.cancelled() for future in desk.futures.values())

    run(body)


@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_of_submit_or_of_a_future_ends_the_stream_with_that_error(is_late: bool) -> None:
    async def body() -> None:
        peer, desk = Peer(3), Desk()
        peer.may_end.clear()

        async def submit(number: int) -> asyncio.Future[str]:
            if number == 2 and not is_late:
                raise InvalidArgumentError("no such thing", "field")
            return await desk.submit(number)

        stream = asyncio.ensure_future(answer_stream(peer.requests(), peer, submit, pair, max_in_flight=8))
        await settle()
        if is_late:
            desk.futures[1].set_exception(InvalidArgumentError("no such thing", "field"))
        with pytest.raises(InvalidArgumentError, match="no such thing"):
            await stream
        assert desk.futures[0].cancelled()

    run(body)


def test_a_peer_that_says_nothing_gets_nothing() -> None:
    async def body() -> None:
        peer, desk = Peer(0), Desk()
        await answer_stream(peer.requests(), peer, desk.submit, pair, max_in_flight=1)
        assert peer.answers == []

    run(body)
