"""A worker works on its groups without a barrier, never holds too many groups, and ends every lease."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from rollmesh.algorithms.config import FilterSection
from rollmesh.errors import RollMeshError
from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.connection import connect_blocking
from rollmesh.types import (
    GroupState,
    InvalidSample,
    LeaseKind,
    RetryableFailure,
    SamplingSpec,
    Score,
    ScoreOutcome,
    StopReason,
)
from rollmesh.wire.outcome import ScoreCall
from tests.fakes.engine import FakeEngine, Request
from tests.fakes.scorers import FakeRewardServicer
from tests.fakes.waiting import until
from tests.unit.rollout.rig import lease, running_rig


def test_a_straggler_holds_up_no_other_group(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 30.0 if request.request_id.startswith("train:0:0/1") else 0.01)
        async with running_rig(redis_url, run_id, engine, max_open_groups=2) as rig:
            await rig.open(*range(12))
            await rig.until(GroupState.READY, 11)
            assert await rig.state(0) is GroupState.LEASED
            assert rig.pool.num_groups_open == 1
            assert rig.counts.num_groups_committed == 11

    asyncio.run(scenario())


def test_credits_and_open_groups_never_exceed_the_limit(redis_url: str, run_id: str) -> None:
    delays = itertools.cycle((0.0, 0.02, 0.005, 0.05))

    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: next(delays))
        async with running_rig(redis_url, run_id, engine, max_open_groups=3) as rig:
            await rig.open(*range(30))
            while (await rig.ledger.snapshot()).num_groups[GroupState.READY] < 30:
                assert rig.leases.credits + rig.pool.num_groups_open <= 3
                await asyncio.sleep(0.002)
            assert engine.max_running <= 3 * 2
            await until(lambda: rig.leases.credits == 3)

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_what_is_committed_is_what_was_generated_and_scored(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return Score(float(call.sample.index), 0.5, {"seen": 1.0})

    async def scenario() -> None:
        engine = FakeEngine(num_tokens=lambda request: 3 + int(request.request_id.split("/")[1]))
        spec = SamplingSpec(0.8, 0.9, 5, 16, seed=100)
        reward = FakeRewardServicer(function)
        async with running_rig(redis_url, run_id, engine, reward, sampling=spec, num_samples=3) as rig:
            await rig.open(7)
            await rig.until(GroupState.READY, 1)
            assert sorted(request.seed for request in engine.requests) == [100, 101, 102]
            assert {tuple(request.prompt_token_ids) for request in engine.requests} == {tuple(map(ord, "prompt 7"))}
            assert rig.counts.num_generated_tokens == 3 + 4 + 5
            assert {call.query_text for call in reward.calls} == {"prompt 7" + "A" * n for n in (3, 4, 5)}

    asyncio.run(scenario())
    queue = BatchQueue(connect_blocking(redis_url, 5.0), run_id)
    (group,) = queue.payloads(["train:0:7"])
    assert [sample.index for sample in group.samples] == [0, 1, 2]
    assert [sample.sample_id for sample in group.samples] == [f"train:0:7/{index}/0" for index in range(3)]
    assert [len(sample.response_token_ids) for sample in group.samples] == [3, 4, 5]
    assert [sample.score for sample in group.samples] == [Score(float(i), 0.5, {"seen": 1.0}) for i in range(3)]
    assert all(sample.behaviour_logprobs.tolist() == [-0.5] * (3 + sample.index) for sample in group.samples)
    assert all(sample.oldest_version.number == 0 for sample in group.samples)


def test_seed_zero_is_left_to_the_engine(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_rig(redis_url, run_id) as rig:
            await rig.open(0)
            await rig.until(GroupState.READY, 1)
            assert [request.seed for request in rig.engine.requests] == [0, 0]

    asyncio.run(scenario())


def test_an_invalid_sample_leaves_its_group(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return InvalidSample("bad label") if call.sample.index == 1 else Score(1.0, 1.0)

    async def scenario() -> None:
        async with running_rig(redis_url, run_id, reward=FakeRewardServicer(function), num_samples=3) as rig:
            await rig.open(0)
            await rig.until(GroupState.READY, 1)
            row = await rig.ledger.row("train:0:0")
            assert row is not None
            assert row.num_samples == 2

    asyncio.run(scenario())


def test_a_group_with_fewer_than_two_valid_samples_fails_for_good(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return InvalidSample("bad label") if call.sample.index else Score(1.0, 1.0)

    async def scenario() -> None:
        async with running_rig(redis_url, run_id, reward=FakeRewardServicer(function), num_samples=3) as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)
            assert await rig.reason(0) == "1 of 3 samples are valid (bad label)"

    asyncio.run(scenario())


def test_a_group_of_one_sample_is_trained_if_that_sample_is_valid_and_fails_for_good_if_not(
    redis_url: str, run_id: str
) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return InvalidSample("bad label") if call.sample.sample_id.startswith("train:0:1/") else Score(1.0, 1.0)

    async def scenario() -> None:
        async with running_rig(redis_url, run_id, reward=FakeRewardServicer(function), num_samples=1) as rig:
            await rig.open(0, 1)
            await rig.until(GroupState.READY, 1)
            await rig.until(GroupState.FAILED, 1)
            assert await rig.state(0) is GroupState.READY
            assert await rig.reason(1) == "0 of 1 samples are valid (bad label)"

    asyncio.run(scenario())


def test_a_sample_without_score_fails_its_group_after_all_attempts_and_the_worker_goes_on(
    redis_url: str, run_id: str
) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        if call.sample.sample_id.startswith("train:0:1/"):
            return RetryableFailure("reward_func raised ValueError: boom")
        return Score(1.0, 1.0)

    async def scenario() -> None:
        async with running_rig(redis_url, run_id, reward=FakeRewardServicer(function)) as rig:
            await rig.open(0, 1, 2)
            await rig.until(GroupState.FAILED, 1)
            await rig.until(GroupState.READY, 2)
            assert "ValueError: boom" in await rig.reason(1)
            row = await rig.ledger.row("train:0:1")
            assert row is not None
            assert rig.leases.leased.count("train:0:1") == 2

    asyncio.run(scenario())


def test_the_failure_of_one_sample_stops_the_generation_of_the_others(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return RetryableFailure("boom")

    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 0.0 if request.request_id.split("/")[1] == "0" else 30.0)
        async with running_rig(redis_url, run_id, engine, FakeRewardServicer(function)) as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)
            assert len(engine.cancelled) == 2
            assert rig.counts.num_samples_generating == 0

    asyncio.run(scenario())


def test_generation_cut_short_is_never_committed(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_rig(redis_url, run_id, FakeEngine(stop_reason=StopReason.ABORTED)) as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)
            assert "cut short" in await rig.reason(0)
            assert rig.reward.calls == []

    asyncio.run(scenario())


def test_a_group_that_outlives_its_lease_is_stopped(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 30.0)
        async with running_rig(redis_url, run_id, engine, ttl_s=0.5) as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)
            assert await rig.reason(0) == "its lease was not renewed in time"
            assert len(engine.cancelled) == 4

    asyncio.run(scenario())


def test_a_fenced_commit_is_dropped_and_the_worker_goes_on(
    redis_url: str, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: request.request_id.startswith("train:0:0/"))
        async with running_rig(redis_url, run_id, engine, max_open_groups=1, max_attempts=1) as rig:
            await rig.open(0)
            await until(lambda: rig.engine.requests)
            await rig.ledger.revoke_member("rollout-0")
            await rig.open(1)
            engine.released.set()
            await rig.until(GroupState.READY, 1)
            assert await rig.state(0) is GroupState.FAILED
            assert await rig.state(1) is GroupState.READY
            assert rig.counts.num_groups_committed == 1

    with caplog.at_level("INFO"):
        asyncio.run(scenario())
    assert any("its group is dropped" in record.getMessage() for record in caplog.records)


def test_a_lease_that_arrives_twice_is_worked_on_once(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        async with running_rig(redis_url, run_id, engine) as rig:
            evaluation = lease(3, kind=LeaseKind.EVALUATE)
            rig.leases.put(evaluation)
            rig.leases.put(evaluation)
            await until(lambda: len(rig.leases.leased) == 2)
            engine.released.set()
            await until(lambda: rig.evaluations.reported)
            await until(lambda: rig.leases.credits == rig.max_open_groups)
            assert len(engine.requests) == 2

    asyncio.run(scenario())


def test_a_newer_lease_of_the_same_group_replaces_the_older(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        async with running_rig(redis_url, run_id, engine) as rig:
            await rig.open(0)
            await until(lambda: len(engine.requests) == 2)
            await rig.ledger.revoke_member("rollout-0")
            rig.leases.wake()
            await until(lambda: len(engine.requests) == 4)
            engine.released.set()
            await rig.until(GroupState.READY, 1)
            assert len(engine.cancelled) == 2
            assert len({request.request_id for request in engine.requests}) == 4
            await until(lambda: rig.leases.credits == rig.max_open_groups)
            assert rig.counts.num_groups_committed == 1

    asyncio.run(scenario())


def test_an_evaluation_group_is_reported_and_not_committed(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_rig(redis_url, run_id, FakeEngine(stop_reason=StopReason.LENGTH)) as rig:
            rig.leases.put(lease(3, kind=LeaseKind.EVALUATE, num_samples=1))
            await until(lambda: rig.evaluations.reported)
            (sample,), failure = rig.evaluations.reported["eval:0:3"]
            assert failure == ""
            assert (sample.reward, sample.score, sample.num_generated_tokens) == (1.0, 1.0, 5)
            assert sample.stop_reason is StopReason.LENGTH
            assert (await rig.ledger.snapshot()).num_opened == 0
            assert rig.counts.num_groups_committed == 0

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_an_evaluation_group_that_fails_is_reported_with_the_reason(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return RetryableFailure("no judge today")

    async def scenario() -> None:
        async with running_rig(redis_url, run_id, reward=FakeRewardServicer(function)) as rig:
            rig.leases.put(lease(3, kind=LeaseKind.EVALUATE, num_samples=1))
            await until(lambda: rig.evaluations.reported)
            samples, failure = rig.evaluations.reported["eval:0:3"]
            assert list(samples) == []
            assert "no judge today" in failure

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_an_evaluation_lease_that_is_over_is_dropped(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_rig(redis_url, run_id) as rig:
            rig.leases.put(lease(3, kind=LeaseKind.EVALUATE, token=2))
            rig.leases.put(lease(4, kind=LeaseKind.EVALUATE))
            await until(lambda: "eval:0:4" in rig.evaluations.reported)
            assert "eval:0:3" not in rig.evaluations.reported
            assert not rig.running.done()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_a_prompt_that_can_never_be_rendered_fails_for_good(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_rig(redis_url, run_id, prompt_json='""') as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)
            assert "renders to no tokens" in await rig.reason(0)
            assert len(rig.leases.leased) == 1

    asyncio.run(scenario())


def test_an_overlong_prompt_that_is_to_be_dropped_is_filtered(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        settings = {"overlong_prompts": "drop"}
        async with running_rig(redis_url, run_id, settings=settings, prompt_json=f'"{"x" * 21}"') as rig:
            await rig.open(0)
            await rig.until(GroupState.FILTERED, 1)
            assert "has 21 tokens, but model.max_length less the new tokens leaves 20" in await rig.reason(0)

    asyncio.run(scenario())


BETWEEN = FilterSection(score_range=(0.0, 1.0))


def test_a_group_outside_the_score_range_is_filtered_and_its_slot_is_free(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        solved = {0: 0, 1: 1, 2: 2}[int(call.sample.sample_id.split(":")[2].split("/")[0])]
        return Score(float(call.sample.index < solved), float(call.sample.index < solved))

    async def scenario() -> None:
        reward = FakeRewardServicer(function)
        async with running_rig(redis_url, run_id, reward=reward, filter_section=BETWEEN) as rig:
            await rig.open(0, 1, 2)
            await rig.until(GroupState.FILTERED, 2)
            await rig.until(GroupState.READY, 1)
            assert await rig.reason(0) == "mean score 0 is not above 0"
            assert await rig.state(1) is GroupState.READY
            assert await rig.reason(2) == "mean score 1 is not below 1"
            assert (await rig.ledger.snapshot()).num_slots_used == 1
            await until(lambda: rig.leases.credits == rig.max_open_groups)
            assert rig.counts.num_groups_committed == 1
            assert len(rig.leases.leased) == 3, "a filtered group is not tried again"

    asyncio.run(scenario())


def test_an_invalid_sample_does_not_count_when_its_group_is_filtered(redis_url: str, run_id: str) -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return InvalidSample("bad label") if call.sample.index == 1 else Score(1.0, 1.0)

    async def scenario() -> None:
        reward = FakeRewardServicer(function)
        async with running_rig(redis_url, run_id, reward=reward, filter_section=BETWEEN, num_samples=3) as rig:
            await rig.open(0)
            await rig.until(GroupState.FILTERED, 1)
            assert await rig.reason(0) == "mean score 1 is not below 1"

    asyncio.run(scenario())


def test_an_aborted_group_fails_and_is_not_filtered(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(stop_reason=StopReason.ABORTED)
        async with running_rig(redis_url, run_id, engine, filter_section=BETWEEN) as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)

    asyncio.run(scenario())


def test_a_group_whose_lease_was_over_is_not_filtered(
    redis_url: str, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        is_revoked = asyncio.Event()

        async def function(call: ScoreCall) -> ScoreOutcome:
            await is_revoked.wait()
            return Score(1.0, 1.0)

        reward = FakeRewardServicer(function)
        async with running_rig(redis_url, run_id, reward=reward, filter_section=BETWEEN, max_attempts=1) as rig:
            await rig.open(0)
            await until(lambda: rig.reward.calls)
            await rig.ledger.revoke_member("rollout-0")
            is_revoked.set()
            await until(lambda: rig.pool.num_groups_open == 0)
            assert await rig.state(0) is GroupState.FAILED

    with caplog.at_level("INFO"):
        asyncio.run(scenario())
    assert any("its group is dropped" in record.getMessage() for record in caplog.records)


def test_an_evaluation_group_is_never_filtered(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        everything = FilterSection(score_range=(2.0, 3.0), should_drop_zero_variance=True)
        async with running_rig(redis_url, run_id, filter_section=everything) as rig:
            rig.leases.put(lease(3, kind=LeaseKind.EVALUATE))
            await until(lambda: rig.evaluations.reported)
            samples, failure = rig.evaluations.reported["eval:0:3"]
            assert ([sample.score for sample in samples], failure) == ([1.0, 1.0], "")

    asyncio.run(asyncio.wait_for(scenario(), 10.0))


def test_an_overlong_prompt_that_is_an_error_ends_its_group_and_not_the_worker(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        async with running_rig(redis_url, run_id, prompt_json=f'"{"x" * 21}"') as rig:
            await rig.open(0)
            await rig.until(GroupState.FAILED, 1)
            assert "prompt train:0:0 has 21 tokens" in await rig.reason(0)
            assert not rig.running.done()

    asyncio.run(scenario())


def test_a_broken_engine_ends_the_worker_and_its_leases_are_handed_back(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 0.3, failures={"generate": RollMeshError("the engine is dead")})
        async with running_rig(redis_url, run_id, engine) as rig:
            await rig.open(0, 1)
            with pytest.raises(RollMeshError, match="the engine is dead"):
                await asyncio.wait_for(asyncio.shield(rig.running), 20.0)
            await rig.close()
            assert (await rig.ledger.snapshot()).num_groups[GroupState.PENDING] == 2

    asyncio.run(scenario())


def test_closing_hands_open_groups_back_even_in_their_last_attempt(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(delay_s=lambda request: 30.0)
        async with running_rig(redis_url, run_id, engine) as rig:
            await rig.open(0, 1)
            await until(lambda: len(engine.requests) >= 4)
            await rig.ledger.revoke_member("rollout-0")
            rig.leases.wake()
            await until(lambda: len(engine.requests) >= 8)
            clock = asyncio.get_running_loop().time
            began_at = clock()
            await rig.close(grace_s=0.1)
            assert clock() - began_at < 25
            assert (await rig.ledger.snapshot()).num_groups[GroupState.PENDING] == 2
            assert await rig.reason(0) == "the worker was told to stop"
            assert rig.engine.num_running == 0
            assert rig.running.done()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_closing_gives_open_groups_the_grace_to_end(redis_url: str, run_id: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine(is_held=lambda request: True)
        async with running_rig(redis_url, run_id, engine) as rig:
            await rig.open(0, 1)
            await until(lambda: len(engine.requests) >= 4)
            closing = asyncio.create_task(rig.close(grace_s=30.0))
            await asyncio.sleep(0)  # It has begun.
            engine.released.set()
            await closing
            assert (await rig.ledger.snapshot()).num_groups[GroupState.READY] == 2
            assert rig.leases.credits == rig.max_open_groups - 2

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_many_groups_in_any_order_are_each_committed_exactly_once(redis_url: str, run_id: str) -> None:
    delays = itertools.cycle((0.0, 0.03, 0.01, 0.0, 0.05))

    def delay_s(request: Request) -> float:
        return next(delays)

    async def scenario() -> None:
        async with running_rig(redis_url, run_id, FakeEngine(delay_s=delay_s), max_open_groups=8) as rig:
            await rig.open(*range(100))
            await rig.until(GroupState.READY, 100, 60.0)
            assert sorted(rig.leases.leased) == sorted(f"train:0:{index}" for index in range(100))
            assert rig.counts.num_groups_committed == 100

    asyncio.run(scenario())
