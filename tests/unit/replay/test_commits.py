"""Commits that wait at the same time share a round trip, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from rollmesh.errors import ReplayError, UnavailableError
from rollmesh.replay import commits
from rollmesh.replay.commits import CommitLine
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.replay.scripts import source
from rollmesh.types import Group, GroupState, PromptId

NUM_GROUPS = 12
MakeGroup = Callable[..., Group]


@pytest.fixture
def round_trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many commits each round trip so far has carried."""
    sizes: list[int] = []
    send = CommitLine._round_trip

    async def counted(line: CommitLine, waiting: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        sizes.append(len(waiting))
        return await send(line, waiting)

    monkeypatch.setattr(CommitLine, "_round_trip", counted)
    return sizes


@asynccontextmanager
async def leased(
    url: str, run_id: str, make_group: MakeGroup
) -> AsyncIterator[tuple[CoordinatorLedger, list[Group], list[int]]]:
    client = connect(url, 5.0)
    try:
        ledger = CoordinatorLedger(client, run_id, term=0)
        await ledger.open_groups([PromptId("train", 0, i) for i in range(NUM_GROUPS)])
        rows = await ledger.lease("rollout-0", 60.0, NUM_GROUPS)
        yield ledger, [make_group(row.prompt_id, row.sequence) for row in rows], [row.fencing_token for row in rows]
    finally:
        await client.aclose()


def test_commits_of_one_moment_travel_together(
    url: str, run_id: str, make_group: MakeGroup, round_trips: list[int]
) -> None:
    async def scenario() -> list[CommitOutcome]:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            return await asyncio.gather(*map(ledger.commit, groups, tokens))

    assert asyncio.run(scenario()) == [CommitOutcome.ACCEPTED] * NUM_GROUPS
    assert sum(round_trips) == NUM_GROUPS
    assert len(round_trips) == 2, "the first goes alone, the others while it is away"


def test_each_gets_its_own_answer(url: str, run_id: str, make_group: MakeGroup) -> None:
    async def scenario() -> list[CommitOutcome]:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            await ledger.commit(groups[3], tokens[3])
            tokens[5] += 1000
            return await asyncio.gather(*map(ledger.commit, groups, tokens))

    outcomes = asyncio.run(scenario())
    assert outcomes.pop(5) is CommitOutcome.FENCED
    assert outcomes.pop(3) is CommitOutcome.DUPLICATE
    assert outcomes == [CommitOutcome.ACCEPTED] * (NUM_GROUPS - 2)


def test_one_script_judges_each_commit_by_itself(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    keys = Keys(run_id)

    def arguments(group: Group, token: int) -> list[str]:
        return [group.group_id, str(token), keys.payload(group.group_id, token), "2", "16", "0.0"]

    async def scenario() -> list[GroupState]:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            for i in (0, 1):
                raw.set(keys.payload(groups[i].group_id, tokens[i]), b"payload", ex=60)
            raw.set(keys.payload(groups[2].group_id, 1000), b"payload", ex=60)
            commits = [(0, tokens[0]), (3, tokens[3]), (1, tokens[1]), (0, tokens[0]), (2, 1000)]
            sent = [argument for i, token in commits for argument in arguments(groups[i], token)]
            answers: Any = raw.eval(source("commit"), len(keys.for_scripts), *keys.for_scripts, keys.row_prefix, *sent)
            assert answers == [b"accepted", b"missing", b"accepted", b"duplicate", b"fenced"]
            assert raw.ttl(keys.payload(groups[0].group_id, tokens[0])) == -1, "what is accepted stays"
            assert not raw.exists(keys.payload(groups[2].group_id, 1000)), "what is fenced goes"
            assert (await ledger.snapshot()).num_groups[GroupState.READY] == 2
            await ledger.revoke_member("rollout-0")
            return [row.state async for row in ledger.rows()]

    states = asyncio.run(scenario())
    assert states == [GroupState.READY] * 2 + [GroupState.PENDING] * (NUM_GROUPS - 2), "the accepted hold no lease"


def test_a_damaged_row_refuses_its_own_commit_only(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup, round_trips: list[int]
) -> None:
    async def scenario() -> list[CommitOutcome | BaseException]:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            row = Keys(run_id).row(groups[4].group_id)
            raw.delete(row)
            raw.set(row, b"not a row")
            return await asyncio.gather(*map(ledger.commit, groups, tokens), return_exceptions=True)

    outcomes = asyncio.run(scenario())
    assert isinstance(outcomes.pop(4), ReplayError)
    assert outcomes == [CommitOutcome.ACCEPTED] * (NUM_GROUPS - 1)
    assert len(round_trips) == 2


def test_a_script_that_the_server_forgot_is_sent_again_for_all(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    async def scenario() -> list[CommitOutcome]:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            raw.script_flush()
            return await asyncio.gather(*map(ledger.commit, groups, tokens))

    assert asyncio.run(scenario()) == [CommitOutcome.ACCEPTED] * NUM_GROUPS


@pytest.mark.parametrize("victim", [0, 1, 5])
@pytest.mark.parametrize("num_passes", [1, 2, 3, 4, 6, 8, 12])
def test_who_is_cancelled_takes_nobody_along(
    url: str, run_id: str, make_group: MakeGroup, victim: int, num_passes: int
) -> None:
    async def scenario() -> None:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            tasks = [asyncio.create_task(ledger.commit(*pair)) for pair in zip(groups, tokens, strict=True)]
            for _ in range(num_passes):  # another point of the round trip each time
                await asyncio.sleep(0)
            tasks[victim].cancel()
            done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10.0)
            outcome = done.pop(victim)
            assert isinstance(outcome, asyncio.CancelledError) or outcome is CommitOutcome.ACCEPTED
            assert set(done) <= {CommitOutcome.ACCEPTED, CommitOutcome.DUPLICATE}
            states = [row.state async for row in ledger.rows()]
            del states[victim]
            assert states == [GroupState.READY] * (NUM_GROUPS - 1)
            assert await ledger.commit(groups[victim], tokens[victim]) is not CommitOutcome.FENCED

    asyncio.run(scenario())


def test_who_shared_a_broken_round_trip_is_told_at_once(
    url: str, run_id: str, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_failed_trips = 0

    async def broken(line: CommitLine, waiting: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        nonlocal num_failed_trips
        num_failed_trips += 1
        await asyncio.sleep(0.01)
        raise redis.exceptions.ConnectionError("the server is away")

    async def scenario() -> None:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            with monkeypatch.context() as patch:
                patch.setattr(CommitLine, "_round_trip", broken)
                done = await asyncio.gather(*map(ledger.commit, groups, tokens), return_exceptions=True)
            assert all(isinstance(error, UnavailableError) for error in done)
            outcomes = await asyncio.gather(*map(ledger.commit, groups, tokens))
            assert outcomes == [CommitOutcome.ACCEPTED] * NUM_GROUPS

    asyncio.run(scenario())
    assert num_failed_trips == 2


def test_a_round_trip_carries_no_more_bytes_than_it_may(
    url: str, run_id: str, make_group: MakeGroup, round_trips: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "_BYTES_PER_CALL", 1)

    async def scenario() -> list[CommitOutcome]:
        async with leased(url, run_id, make_group) as (ledger, groups, tokens):
            return await asyncio.gather(*map(ledger.commit, groups, tokens))

    assert asyncio.run(scenario()) == [CommitOutcome.ACCEPTED] * NUM_GROUPS
    assert round_trips == [1] * NUM_GROUPS
