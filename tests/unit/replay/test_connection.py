from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis import exceptions

from rollmesh.errors import ConfigError, ReplayError, UnavailableError
from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.connection import check_server, connect, connect_blocking, translated
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.types import Group, GroupState, PromptId


@pytest.fixture
def own_server(short_folder: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(short_folder) as server:
        yield server


@pytest.fixture
def client(own_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    client = connect_blocking(own_server.url, 5.0)
    yield client
    client.close()


def test_a_server_that_can_hold_a_run_is_accepted(url: str) -> None:
    check_server(url, 5.0)


def test_a_server_that_cannot_be_reached_is_refused_without_showing_the_password() -> None:
    with pytest.raises(ConfigError, match=r"replay\.url: redis://\*\*\*@127\.0\.0\.1:1") as caught:
        check_server("redis://me:secret@127.0.0.1:1", 0.5)
    assert "secret" not in str(caught.value)


def test_a_server_that_misses_a_deadline_is_asked_again(
    own_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(own_server.pid, signal.SIGSTOP)
    tries = itertools.count()

    def connect_then_thaw(url: str, timeout_s: float) -> redis.Redis:
        if next(tries) == 0:
            return connect_blocking(url, 0.05)
        os.kill(own_server.pid, signal.SIGCONT)
        return connect_blocking(url, timeout_s)

    monkeypatch.setattr("rollmesh.replay.connection.connect_blocking", connect_then_thaw)
    try:
        check_server(own_server.url, 20.0)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert next(tries) == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "has not answered after 2 s"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "was still loading its data after 2 s"),
    ],
    ids=["silent", "loading"],
)
def test_a_server_that_does_not_come_to_answer_is_refused_when_the_time_is_up(answer: bytes, problem: str) -> None:
    async def scenario() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(1000):
                writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            with pytest.raises(ConfigError) as caught:
                await asyncio.to_thread(check_server, url, 2.0)
        fix = "see what holds the server up, correct the address, or raise replay.timeout_s"
        assert str(caught.value) == f"replay.url: {url} {problem}; {fix}"

    asyncio.run(scenario())


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"replay\.url.*is not an address"):
        check_server(url, 0.5)


def test_a_replica_is_refused(own_server: EmbeddedRedis, client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")
    with pytest.raises(ConfigError, match="is a replica"):
        check_server(own_server.url, 5.0)


def test_a_server_that_drops_keys_is_refused_only_while_its_memory_is_limited(
    own_server: EmbeddedRedis, client: redis.Redis
) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", "0")
    check_server(own_server.url, 5.0)
    client.config_set("maxmemory", "100mb")
    with pytest.raises(ConfigError, match="maxmemory-policy allkeys-lru"):
        check_server(own_server.url, 5.0)
    client.config_set("maxmemory-policy", "noeviction")
    check_server(own_server.url, 5.0)


def test_an_old_server_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollmesh.replay.connection.OLDEST_SERVER", (99, 0))
    with pytest.raises(ConfigError, match=r"use 99\.0 or newer"):
        check_server(url, 5.0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ConnectionError("gone"), UnavailableError),
        (exceptions.TimeoutError("slow"), UnavailableError),
        (exceptions.BusyLoadingError("loading"), UnavailableError),
        (exceptions.ReadOnlyError("replica"), UnavailableError),
        (exceptions.OutOfMemoryError("full"), UnavailableError),
        (exceptions.ResponseError("MISCONF disk is full"), UnavailableError),
        (exceptions.ResponseError("user_script:9: -OOM command not allowed"), UnavailableError),
        (exceptions.ResponseError("WRONGTYPE"), ReplayError),
    ],
)
def test_errors_worth_another_try_are_told_from_the_others(
    error: exceptions.RedisError, expected: type[Exception]
) -> None:
    assert type(translated(error)) is expected


def test_full_memory_refuses_a_commit_whole_and_the_learner_can_still_make_room(
    own_server: EmbeddedRedis, client: redis.Redis, make_group: Callable[..., Group]
) -> None:
    async def scenario() -> None:
        connection = connect(own_server.url, 5.0)
        ledger, queue = CoordinatorLedger(connection, "run", term=0), BatchQueue(client, "run")
        await ledger.open_groups([PromptId("train", 0, index) for index in range(3)])
        first, second, third = await ledger.lease("rollout-0", 60, 3)
        await ledger.commit(make_group(first.prompt_id), first.fencing_token)

        client.config_set("maxmemory", "1")
        before = await ledger.row(second.group_id)
        with pytest.raises(UnavailableError, match="cannot write now"):
            await ledger.commit(make_group(second.prompt_id), second.fencing_token)
        assert await ledger.row(second.group_id) == before
        with pytest.raises(UnavailableError):
            await ledger.open_groups([PromptId("train", 0, 3)])
        assert (await ledger.snapshot()).num_opened == 3

        assert queue.take_batch(1, 1, 1, 1.0) is not None
        assert queue.mark_trained(1) == 1
        assert queue.retire(1) == 1
        assert await ledger.give_back(third.group_id, third.fencing_token, "full") is GroupState.PENDING

        client.config_set("maxmemory", "0")
        await ledger.commit(make_group(second.prompt_id), second.fencing_token)
        assert (await ledger.snapshot()).num_groups[GroupState.READY] == 1
        await connection.aclose()

    asyncio.run(scenario())
