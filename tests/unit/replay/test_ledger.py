from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from redis.asyncio.client import Pipeline

from rollmesh.errors import InvalidArgumentError, RunEndedError, UnavailableError
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.keys import Keys
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.replay.rows import GroupRow
from rollmesh.types import Group, GroupState, PolicyVersion, PromptId

MakeGroup = Callable[..., Group]
PROMPTS = [PromptId("train", 0, index) for index in range(10)]


@asynccontextmanager
async def open_ledger(url: str, run_id: str, max_attempts: int = 3) -> AsyncIterator[CoordinatorLedger]:
    client = connect(url, 5.0)
    try:
        yield CoordinatorLedger(client, run_id, max_attempts=max_attempts, term=0)
    finally:
        await client.aclose()


def with_ledger(
    url: str, run_id: str, scenario: Callable[[CoordinatorLedger], Awaitable[None]], max_attempts: int = 3
) -> None:
    async def main() -> None:
        async with open_ledger(url, run_id, max_attempts) as ledger:
            await asyncio.wait_for(scenario(ledger), 60)

    asyncio.run(main())


def ids(rows: list[GroupRow]) -> list[str]:
    return [row.group_id for row in rows]


def end_time_of(raw: redis.Redis, run_id: str, row: GroupRow) -> None:
    """Let the time of one lease be up."""
    raw.zadd(Keys(run_id).deadlines, {row.group_id: 1}, xx=True)


def test_groups_are_opened_once_in_a_dense_line_and_hold_slots(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        first = await ledger.open_groups(PROMPTS[:3])
        again = await ledger.open_groups(PROMPTS[1:5])
        assert [row.sequence for row in first] == [0, 1, 2]
        assert [row.sequence for row in again] == [1, 2, 3, 4]
        assert first[0].prompt_id == PROMPTS[0]
        snapshot = await ledger.snapshot()
        assert (snapshot.num_opened, snapshot.num_slots_used) == (5, 5)
        assert snapshot.num_groups[GroupState.PENDING] == snapshot.num_live == 5

    with_ledger(url, run_id, scenario)


def test_opening_stops_when_the_slots_are_taken(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        assert len(await ledger.open_groups(PROMPTS[:3], num_slots=4)) == 3
        assert ids(await ledger.open_groups(PROMPTS[2:7], num_slots=4)) == ["train:0:2", "train:0:3"]
        assert (await ledger.snapshot()).num_slots_used == 4

    with_ledger(url, run_id, scenario)


def test_a_closed_ledger_opens_nothing_new_but_answers_for_what_it_has(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:2])
        assert not await ledger.is_closed()
        await ledger.close()
        await ledger.close()
        assert await ledger.is_closed()
        assert len(await ledger.open_groups(PROMPTS[:2])) == 2
        with pytest.raises(RunEndedError):
            await ledger.open_groups(PROMPTS[:3])
        assert (await ledger.snapshot()).num_opened == 2

    with_ledger(url, run_id, scenario)


def test_the_first_in_the_line_is_leased_first_with_a_growing_token(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:4])
        first = await ledger.lease("rollout-0", 60, 3)
        second = await ledger.lease("rollout-1", 60, 3)
        assert [row.sequence for row in first + second] == [0, 1, 2, 3]
        tokens = [row.fencing_token for row in first + second]
        assert tokens == sorted(set(tokens))
        assert {row.member for row in second} == {"rollout-1"}
        assert await ledger.lease("rollout-0", 60, 0) == []

    with_ledger(url, run_id, scenario)


def test_a_lease_request_that_arrives_twice_gets_the_same_leases(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:4])
        first = await ledger._rows("lease", "rollout-0", 60_000, 2, "request-1", -1)
        again = await ledger._rows("lease", "rollout-0", 60_000, 2, "request-1", -1)
        other = await ledger._rows("lease", "rollout-0", 60_000, 2, "request-2", -1)
        assert first == again
        assert [row.sequence for row in other] == [2, 3]

    with_ledger(url, run_id, scenario)


def test_expired_work_keeps_its_place_and_is_leased_again_first(url: str, run_id: str, raw: redis.Redis) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:4])
        held = await ledger.lease("rollout-0", 60, 2)
        end_time_of(raw, run_id, held[1])
        (expired,) = await ledger.expire_leases()
        assert (expired.state, expired.attempt, expired.reason) == (GroupState.PENDING, 1, "lease expired")
        (again, _) = await ledger.lease("rollout-1", 60, 2)
        assert (again.group_id, again.sequence, again.attempt) == (held[1].group_id, 1, 1)
        assert again.prompt_id == held[1].prompt_id
        assert again.fencing_token > held[1].fencing_token

    with_ledger(url, run_id, scenario)


def test_leases_expire_by_the_clock_of_the_server(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:2])
        await ledger.lease("rollout-0", 0.02, 1)
        await ledger.lease("rollout-1", 60, 1)
        await asyncio.sleep(0.05)
        assert ids(await ledger.expire_leases()) == ["train:0:0"]

    with_ledger(url, run_id, scenario)


def test_a_renewed_lease_lives_on_and_one_that_is_over_stays_over(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:4])
        kept, late, superseded, ended = await ledger.lease("rollout-0", 1, 4)
        end_time_of(raw, run_id, superseded)
        await ledger.expire_leases()
        (again,) = await ledger.lease("rollout-1", 60, 1)
        await ledger.give_back(ended.group_id, ended.fencing_token, "broken")
        end_time_of(raw, run_id, late)
        asked = [(row.group_id, row.fencing_token) for row in (kept, late, superseded, ended)]
        over = {late.group_id, superseded.group_id, ended.group_id}
        assert await ledger.renew(asked, 60) == over
        assert await ledger.renew(asked, 60) == over
        left_s = await ledger.seconds_left([kept.group_id, again.group_id, ended.group_id])
        assert set(left_s) == {kept.group_id, again.group_id}
        assert all(50 < seconds <= 60 for seconds in left_s.values())
        assert ids(await ledger.expire_leases()) == [late.group_id]
        group = make_group(PROMPTS[1], sequence=1)
        assert await ledger.commit(group, late.fencing_token) is CommitOutcome.FENCED

    with_ledger(url, run_id, scenario)


def test_many_leases_are_renewed_at_once(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups([PromptId("train", 0, index) for index in range(260)])
        rows = await ledger.lease("rollout-0", 1, 260)
        assert await ledger.renew([(row.group_id, row.fencing_token) for row in rows], 60) == set()
        left_s = await ledger.seconds_left([row.group_id for row in rows])
        assert min(left_s.values()) > 50

    with_ledger(url, run_id, scenario)


def test_a_group_fails_after_its_last_attempt_and_frees_its_slot(url: str, run_id: str, raw: redis.Redis) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        for _ in range(2):
            (row,) = await ledger.lease("rollout-0", 60, 1)
            end_time_of(raw, run_id, row)
            (ended,) = await ledger.expire_leases()
        assert (ended.state, ended.attempt, ended.reason) == (GroupState.FAILED, 2, "lease expired")
        assert (await ledger.snapshot()).num_slots_used == 0
        assert await ledger.lease("rollout-0", 60, 1) == []

    with_ledger(url, run_id, scenario, max_attempts=2)


def test_all_leases_of_a_lost_member_end_and_nobody_elses(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups([PromptId("train", 0, index) for index in range(260)])
        await ledger.lease("rollout-1", 60, 250)
        await ledger.lease("rollout-10", 60, 10)
        assert len(await ledger.revoke_member("rollout-1")) == 250
        snapshot = await ledger.snapshot()
        assert snapshot.num_groups[GroupState.PENDING] == 250
        assert snapshot.num_groups[GroupState.LEASED] == 10
        assert {row.member async for row in ledger.rows(GroupState.LEASED)} == {"rollout-10"}

    with_ledger(url, run_id, scenario)


def test_the_same_commit_twice_is_acknowledged_twice_and_stored_once(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        (row,) = await ledger.lease("rollout-0", 60, 1)
        group = make_group(row.prompt_id, version=3)
        assert await ledger.commit(group, row.fencing_token) is CommitOutcome.ACCEPTED
        assert await ledger.commit(group, row.fencing_token) is CommitOutcome.DUPLICATE
        key = Keys(run_id).payload(row.group_id, row.fencing_token)
        assert raw.ttl(key) == -1
        assert len(list(raw.scan_iter(f"*{{{run_id}}}:payload:*"))) == 1
        ready = await ledger.row(row.group_id)
        assert ready is not None
        assert (ready.state, ready.num_samples, ready.num_tokens) == (GroupState.READY, 2, 16)
        assert ready.oldest_version == PolicyVersion(0, 3)

    with_ledger(url, run_id, scenario)


@pytest.mark.parametrize("is_swept", [True, False])
def test_a_commit_after_the_lease_is_over_changes_nothing(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup, is_swept: bool
) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        (row,) = await ledger.lease("rollout-0", 60, 1)
        end_time_of(raw, run_id, row)
        if is_swept:
            await ledger.expire_leases()
        before = await ledger.row(row.group_id)
        assert await ledger.commit(make_group(row.prompt_id), row.fencing_token) is CommitOutcome.FENCED
        assert await ledger.row(row.group_id) == before
        assert not list(raw.scan_iter(f"*{{{run_id}}}:payload:*"))

    with_ledger(url, run_id, scenario)


def test_a_late_commit_does_not_touch_what_the_next_holder_stored(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        (late,) = await ledger.lease("rollout-0", 60, 1)
        await ledger.revoke_member("rollout-0")
        (current,) = await ledger.lease("rollout-1", 60, 1)
        assert await ledger.commit(make_group(late.prompt_id, num_tokens=9), late.fencing_token) is CommitOutcome.FENCED
        assert await ledger.commit(make_group(late.prompt_id), current.fencing_token) is CommitOutcome.ACCEPTED
        assert await ledger.commit(make_group(late.prompt_id, num_tokens=9), late.fencing_token) is CommitOutcome.FENCED
        (payload,) = raw.scan_iter(f"*{{{run_id}}}:payload:*")
        assert payload.decode() == Keys(run_id).payload(late.group_id, current.fencing_token)

    with_ledger(url, run_id, scenario)


def test_a_commit_of_an_unknown_group_is_fenced(url: str, run_id: str, make_group: MakeGroup) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        assert await ledger.commit(make_group(PROMPTS[0]), 1) is CommitOutcome.FENCED

    with_ledger(url, run_id, scenario)


def test_a_payload_that_no_commit_claims_goes_by_itself(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WorkerDiedError(Exception):
        pass

    async def send_only_the_payload(pipeline: Pipeline, raise_on_error: bool = True) -> None:
        payload, _script = pipeline.command_stack
        raw.execute_command(*payload[0])  # type: ignore[no-untyped-call]
        raise WorkerDiedError

    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        (row,) = await ledger.lease("rollout-0", 60, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "execute", send_only_the_payload)
            with pytest.raises(WorkerDiedError):
                await ledger.commit(make_group(row.prompt_id), row.fencing_token)
        (staged,) = raw.scan_iter(f"*{{{run_id}}}:payload:*")
        assert 0 < raw.ttl(staged) <= 600
        assert await ledger.commit(make_group(row.prompt_id), row.fencing_token) is CommitOutcome.ACCEPTED
        assert raw.ttl(staged) == -1

    with_ledger(url, run_id, scenario)


def test_a_group_larger_than_the_limit_is_refused_before_it_is_sent(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    async def main() -> None:
        client = connect(url, 5.0)
        ledger = CoordinatorLedger(client, run_id, payload_limit_bytes=1000, term=0)
        with pytest.raises(InvalidArgumentError, match=r"replay\.payload_limit_bytes is 1000"):
            await ledger.commit(make_group(PROMPTS[0], num_tokens=500), 1)
        await client.aclose()

    asyncio.run(main())
    assert not list(raw.scan_iter(f"*{{{run_id}}}:*"))


def test_given_back_work_waits_at_its_place_until_attempts_are_exhausted(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:2])
        (row,) = await ledger.lease("rollout-0", 60, 1)
        assert await ledger.give_back(row.group_id, row.fencing_token, "shutting down") is GroupState.PENDING
        assert await ledger.give_back(row.group_id, row.fencing_token, "shutting down") is GroupState.PENDING
        (again,) = await ledger.lease("rollout-1", 60, 1)
        assert (again.sequence, again.attempt, again.reason) == (0, 1, "shutting down")
        assert await ledger.give_back(row.group_id, row.fencing_token, "too late") is None
        assert await ledger.give_back(again.group_id, again.fencing_token, "no reward") is GroupState.FAILED
        failed = [row async for row in ledger.rows(GroupState.FAILED)]
        assert [(row.group_id, row.reason, row.attempt) for row in failed] == [("train:0:0", "no reward", 2)]

    with_ledger(url, run_id, scenario, max_attempts=2)


def test_a_lease_that_ends_through_no_fault_of_its_group_never_fails_the_group(
    url: str, run_id: str, raw: redis.Redis
) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        for attempt in range(1, 4):
            (row,) = await ledger.lease("rollout-0", 60, 1)
            outcome = await ledger.give_back(row.group_id, row.fencing_token, "leaving", is_excused=True)
            assert outcome is GroupState.PENDING
            (row,) = await ledger.lease("rollout-0", 60, 1)
            end_time_of(raw, run_id, row)
            (row,) = await ledger.expire_leases(is_excused=True)
            assert (row.state, row.attempt) == (GroupState.PENDING, 2 * attempt)

    with_ledger(url, run_id, scenario, max_attempts=1)


def test_a_final_give_back_fails_at_once_and_a_filtered_group_frees_its_slot(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:3])
        final, filtered, _ = await ledger.lease("rollout-0", 60, 3)
        outcome = await ledger.give_back(final.group_id, final.fencing_token, "invalid", is_final=True)
        assert outcome is GroupState.FAILED
        for _ in range(2):
            outcome = await ledger.filter_group(filtered.group_id, filtered.fencing_token, "all scores equal")
            assert outcome is GroupState.FILTERED
        row = await ledger.row(filtered.group_id)
        assert row is not None
        assert (row.state, row.attempt, row.reason) == (GroupState.FILTERED, 0, "all scores equal")
        snapshot = await ledger.snapshot()
        assert (snapshot.num_slots_used, snapshot.num_successful) == (1, 1)

    with_ledger(url, run_id, scenario)


def test_rows_are_listed_in_the_order_of_the_line(url: str, run_id: str) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups([PromptId("train", 0, 1000 - index) for index in range(230)])
        assert [row.sequence async for row in ledger.rows()] == list(range(230))
        assert await ledger.row("train:0:5000") is None

    with_ledger(url, run_id, scenario)


def test_the_journal_tells_every_transition(url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        (row,) = await ledger.lease("rollout-0", 60, 1)
        await ledger.give_back(row.group_id, row.fencing_token, "shutting down")
        (row,) = await ledger.lease("rollout-1", 60, 1)
        await ledger.commit(make_group(row.prompt_id), row.fencing_token)
        await ledger.commit(make_group(row.prompt_id), row.fencing_token)
        journal: Any = raw.xrange(Keys(run_id).journal)
        entries = [fields for _, fields in journal]
        assert [entry[b"state"].decode() for entry in entries] == ["pending", "leased", "pending", "leased", "ready"]
        assert entries[2][b"reason"] == b"shutting down"
        assert entries[3][b"member"] == b"rollout-1"

    with_ledger(url, run_id, scenario)


def test_scripts_that_the_server_forgot_are_loaded_again(
    url: str, run_id: str, raw: redis.Redis, make_group: MakeGroup
) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        await ledger.open_groups(PROMPTS[:1])
        (row,) = await ledger.lease("rollout-0", 60, 1)
        raw.script_flush()
        assert await ledger.commit(make_group(row.prompt_id), row.fencing_token) is CommitOutcome.ACCEPTED

    with_ledger(url, run_id, scenario)


def test_a_server_that_is_gone_is_unavailable_not_a_bug(run_id: str, make_group: MakeGroup) -> None:
    async def scenario(ledger: CoordinatorLedger) -> None:
        with pytest.raises(UnavailableError):
            await ledger.snapshot()
        with pytest.raises(UnavailableError):
            await ledger.commit(make_group(PROMPTS[0]), 1)

    with_ledger("unix:///nowhere/redis.sock", run_id, scenario)
