"""Two runs of one name never share keys in Redis."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from rollmesh.errors import ConfigError, SupersededError
from rollmesh.replay import claim as claim_module
from rollmesh.replay.claim import RunClaim
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.identity import RunIdentity, clear_run, expect_own_run, find_run, refuse_known_run
from rollmesh.replay.keys import Keys
from rollmesh.types import PolicyVersion, PromptId

OLD, NEW = RunIdentity("0" * 16, "aaaa"), RunIdentity("1" * 16, "bbbb")


@pytest.fixture
def on_redis(url: str) -> Callable[[Callable[[Any], Awaitable[Any]]], Any]:
    def run(body: Callable[[Any], Awaitable[Any]]) -> Any:
        async def scenario() -> Any:
            client = connect(url, 5.0)
            try:
                return await body(client)
            finally:
                await client.aclose()

        return asyncio.run(scenario())

    return run


def claim_of(client: Any, run_id: str, identity: RunIdentity, outage_timeout_s: float = 30.0) -> RunClaim:
    return RunClaim(client, run_id, identity, "Redis at home", outage_timeout_s)


async def work(client: Any, run_id: str, state: str) -> None:
    """A run that opened three groups and ended in ``state``; empty: it was killed."""
    claim = claim_of(client, run_id, OLD)
    term = (await claim.take()).term
    await CoordinatorLedger(client, run_id, term=term).open_groups([PromptId("train", 0, index) for index in range(3)])
    if state:
        await claim.release(state)


@pytest.mark.parametrize("state", ["finished", "failed", "interrupted"])
def test_the_keys_of_an_earlier_run_are_refused_with_their_age_and_state(
    on_redis: Any, url: str, run_id: str, state: str
) -> None:
    on_redis(lambda client: work(client, run_id, state))
    pattern = rf"keys rollmesh:\{{{run_id}\}}:\* of a run named '{run_id}' that started \d s ago and is {state} "
    with pytest.raises(ConfigError, match=pattern + r"\(3 groups opened\); pass --overwrite to .* another name"):
        refuse_known_run(url, 5.0, run_id)
    with pytest.raises(ConfigError, match=r"holds keys .* of another run of this name; start with .*--overwrite"):
        on_redis(lambda client: claim_of(client, run_id, NEW).take())


def test_keys_without_an_identity_are_an_earlier_run_as_well(on_redis: Any, url: str, run_id: str) -> None:
    on_redis(lambda client: CoordinatorLedger(client, run_id, term=0).open_groups([PromptId("train", 0, 0)]))
    with pytest.raises(ConfigError, match=rf"a run named '{run_id}' and is interrupted \(1 group opened\)"):
        refuse_known_run(url, 5.0, run_id)
    with pytest.raises(ConfigError, match="another run of this name"):
        on_redis(lambda client: claim_of(client, run_id, NEW).take())


def test_a_run_that_goes_on_is_neither_joined_nor_cleared(
    on_redis: Any, url: str, run_id: str, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "RENEW_S", 0.05)

    async def scenario(client: Any) -> None:
        claim = claim_of(client, run_id, OLD)
        term = (await claim.take()).term
        await CoordinatorLedger(client, run_id, term=term).open_groups([PromptId("train", 0, 0)])
        renewing = asyncio.create_task(claim.until_lost())
        for refused in (refuse_known_run, clear_run):
            with pytest.raises(ConfigError, match=r"and still goes on; end that run, or choose another name"):
                await asyncio.to_thread(refused, url, 5.0, run_id)
        with pytest.raises(ConfigError, match="of another run of this name"):
            await claim_of(client, run_id, NEW).take()
        renewing.cancel()

    on_redis(scenario)
    assert raw.exists(Keys(run_id).line)


def test_the_keys_of_a_run_that_was_killed_are_cleared_once_its_claim_has_ended(
    on_redis: Any, url: str, run_id: str, raw: redis.Redis
) -> None:
    on_redis(lambda client: work(client, run_id, ""))
    raw.set(f"rollmesh:{{{run_id}2}}:line", "another run's")
    raw.pexpire(Keys(run_id).owner, 300)
    assert clear_run(url, 5.0, run_id) > 3
    assert find_run(raw, run_id) is None
    assert not list(raw.scan_iter(f"rollmesh:{{{run_id}}}:*"))
    assert raw.exists(f"rollmesh:{{{run_id}2}}:line")
    on_redis(lambda client: claim_of(client, run_id, NEW).take())


def test_the_same_identity_goes_on_where_it_was(on_redis: Any, run_id: str, raw: redis.Redis) -> None:
    on_redis(lambda client: work(client, run_id, "interrupted"))
    on_redis(lambda client: claim_of(client, run_id, OLD).take())
    known = find_run(raw, run_id)
    assert known is not None
    assert (known.identity, known.state, known.num_opened, known.is_owned) == (OLD, "running", 3, True)


def test_a_resumed_run_finds_its_own_keys_or_none(on_redis: Any, url: str, run_id: str, raw: redis.Redis) -> None:
    expect_own_run(url, 5.0, run_id, OLD.id)
    on_redis(lambda client: work(client, run_id, "interrupted"))
    expect_own_run(url, 5.0, run_id, OLD.id)
    with pytest.raises(ConfigError, match=r"holds keys .* of another run of this name; name the Redis that this run"):
        expect_own_run(url, 5.0, run_id, NEW.id)


def test_a_resumed_run_waits_for_the_claim_of_a_coordinator_that_was_killed(
    on_redis: Any, url: str, run_id: str, raw: redis.Redis
) -> None:
    on_redis(lambda client: work(client, run_id, ""))
    raw.pexpire(Keys(run_id).owner, 400)
    expect_own_run(url, 5.0, run_id, OLD.id)
    assert not raw.exists(Keys(run_id).owner)
    on_redis(lambda client: claim_of(client, run_id, OLD).take())


def test_a_run_that_goes_on_elsewhere_is_not_resumed(
    on_redis: Any, url: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "RENEW_S", 0.05)

    async def scenario(client: Any) -> None:
        claim = claim_of(client, run_id, OLD)
        await claim.take()
        renewing = asyncio.create_task(claim.until_lost())
        with pytest.raises(ConfigError, match="and still goes on"):
            await asyncio.to_thread(expect_own_run, url, 5.0, run_id, OLD.id)
        renewing.cancel()

    on_redis(scenario)


def test_a_claim_that_expired_while_its_process_slept_is_taken_again(
    on_redis: Any, run_id: str, raw: redis.Redis
) -> None:
    async def scenario(client: Any) -> None:
        claim = claim_of(client, run_id, OLD)
        await claim.take()
        raw.delete(Keys(run_id).owner)
        await claim.release("finished")

    on_redis(scenario)
    known = find_run(raw, run_id)
    assert known is not None
    assert (known.state, known.is_owned) == ("finished", False)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ("cleared", "Redis at home has lost the run's keys"),
        ("taken", "another run named"),
        ("away", r"Redis at home, which holds the replay queue, has been away for .*outage_timeout_s is 0\.1"),
    ],
)
def test_a_lost_claim_says_why_the_run_cannot_go_on(
    on_redis: Any, run_id: str, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch, loss: str, sentence: str
) -> None:
    monkeypatch.setattr(claim_module, "RENEW_S", 0.05)

    async def scenario(client: Any) -> str:
        if loss == "away":
            absent = connect("unix:///nowhere/redis.sock", 0.5)
            return await asyncio.wait_for(claim_of(absent, run_id, OLD, 0.1).until_lost(), 30)
        claim = claim_of(client, run_id, OLD)
        await claim.take()
        raw.delete(Keys(run_id).owner, Keys(run_id).identity, Keys(run_id).meta)
        if loss == "taken":
            await claim_of(client, run_id, NEW).take()
        return await asyncio.wait_for(claim.until_lost(), 30)

    reason = on_redis(scenario)
    assert re.match(sentence, reason), reason


def test_a_coordinator_that_is_started_again_takes_its_run_at_once_and_the_old_one_ends(
    on_redis: Any, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "RENEW_S", 0.05)

    async def scenario(client: Any) -> None:
        old, new = claim_of(client, run_id, OLD), claim_of(client, run_id, OLD)
        first = await old.take()
        second = await new.take()
        assert (first.former_state, second.former_state) == ("", "running")
        assert second.term > first.term
        with pytest.raises(SupersededError, match=f"the current term is {second.term}, and this coordinator has term"):
            await asyncio.wait_for(old.until_lost(), 30)
        await old.note_end("failed")
        await old.release("failed")
        assert (await new.take()).former_state == "running", "the old one says nothing about the run any more"

    on_redis(scenario)


CALLS: dict[str, Callable[[CoordinatorLedger], Awaitable[Any]]] = {
    "open_groups": lambda ledger: ledger.open_groups([PromptId("train", 0, 9)]),
    "close": lambda ledger: ledger.close(),
    "lease": lambda ledger: ledger.lease("rollout-0", 60.0, 1),
    "renew": lambda ledger: ledger.renew([("train:0:0", 1)], 60.0),
    "expire_leases": lambda ledger: ledger.expire_leases(),
    "revoke_member": lambda ledger: ledger.revoke_member("rollout-0"),
    "give_back": lambda ledger: ledger.give_back("train:0:0", 1, "no reason"),
    "record_version": lambda ledger: ledger.record_version(PolicyVersion(0, 1), 1),
    "release_slots": lambda ledger: ledger.release_slots(1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_coordinator_that_was_replaced_changes_nothing(
    on_redis: Any, run_id: str, raw: redis.Redis, call: Callable[[CoordinatorLedger], Awaitable[Any]]
) -> None:
    async def scenario(client: Any) -> None:
        old = CoordinatorLedger(client, run_id, term=(await claim_of(client, run_id, OLD).take()).term)
        await old.open_groups([PromptId("train", 0, index) for index in range(2)])
        await old.lease("rollout-0", 60.0, 1)
        await claim_of(client, run_id, OLD).take()
        before = {key: raw.dump(key) for key in raw.keys(f"{Keys(run_id).prefix}*")}
        with pytest.raises(SupersededError, match="another coordinator of this run has taken over"):
            await call(old)
        assert {key: raw.dump(key) for key in raw.keys(f"{Keys(run_id).prefix}*")} == before

    on_redis(scenario)


@pytest.mark.parametrize(
    ("state", "fingerprint", "refusal"),
    [
        ("interrupted", "aaaa", None),
        ("interrupted", "cccc", r"run\.id: .* other settings"),
        ("finished", "aaaa", "another"),
    ],
)
def test_a_coordinator_without_an_id_goes_on_with_an_interrupted_run_of_the_same_settings(
    on_redis: Any, run_id: str, state: str, fingerprint: str, refusal: str | None
) -> None:
    async def scenario(client: Any) -> None:
        await work(client, run_id, state)
        identity = RunIdentity("2" * 16, fingerprint)
        claim = RunClaim(client, run_id, identity, "Redis at home", 30.0, may_adopt=True)
        if refusal is None:
            assert (await claim.take()).former_state == state
            await claim.release("finished")
        else:
            with pytest.raises(ConfigError, match=refusal):
                await claim.take()

    on_redis(scenario)
