"""Every answer of the scorers leads a finished sample to a score, a reason or a failure."""

from __future__ import annotations

import asyncio
import itertools
import logging

import numpy as np
import pytest

from rollmesh.errors import ConfigError, UnavailableError
from rollmesh.rpc.scorer_clients import ReferenceClient, RewardClient
from rollmesh.types import (
    Float32Array,
    InvalidSample,
    PolicyFault,
    PolicyVersion,
    PromptId,
    RetryableFailure,
    Sample,
    Score,
    ScoreOutcome,
    StopReason,
    Turn,
    VersionSpan,
)
from rollmesh.wire.logprobs import LogProbsCall
from rollmesh.wire.outcome import ScoreCall
from services.rollout.scoring import Scorer, ScoringFailedError
from tests.fakes.scorers import (
    FakeReferenceServicer,
    FakeRewardServicer,
    ScoreFunction,
    reference_server,
    reward_server,
)
from tests.fakes.waiting import until


def score_call(index: int = 0) -> ScoreCall:
    sample = Sample(
        sample_id=f"train:0:7/{index}/0",
        index=index,
        prompt_id=PromptId("train", 0, 7),
        prompt_token_ids=np.array([1, 2], np.int32),
        response_token_ids=np.array([3, 4, 5], np.int32),
        turns=(Turn(3, 0, StopReason.STOP),),
        behaviour_logprobs=np.array([-1, -2, -3], np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, 1), 0, 3),),
    )
    return ScoreCall(sample, "the prompt", "the prompt and response", '"15"', "operators")


async def score_with(
    function: ScoreFunction, *, attempts: int = 3, timeout_s: float = 10.0, num_samples: int = 1
) -> tuple[list[Sample | InvalidSample | BaseException], FakeRewardServicer]:
    servicer = FakeRewardServicer(function)
    async with reward_server(servicer) as server:
        client = RewardClient(server.address)
        await client.connect(5.0)
        scorer = Scorer(client, None, attempts=attempts, timeout_s=timeout_s)
        samples = [scorer.score(score_call(index), None) for index in range(num_samples)]
        outcomes = await asyncio.gather(*samples, return_exceptions=True)
        assert scorer.num_scoring == 0
        await client.close()
    return outcomes, servicer


def scored(outcome: object) -> Score:
    assert isinstance(outcome, Sample), outcome
    assert outcome.score is not None
    return outcome.score


def test_a_score_is_attached_and_the_server_is_told_everything() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return Score(0.5, 0.25, {"length": 3.0})

    (outcome,), servicer = asyncio.run(score_with(function))
    assert scored(outcome) == Score(0.5, 0.25, {"length": 3.0})
    (call,) = servicer.calls
    assert (call.prompt_text, call.query_text) == ("the prompt", "the prompt and response")
    assert (call.label_json, call.datasource, call.sample.sample_id) == ('"15"', "operators", "train:0:7/0/0")
    assert servicer.requests[0].deadline_ms > 0


def test_answers_in_any_order_find_their_samples() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        index = call.sample.index
        await asyncio.sleep(0.02 * (5 - index))
        return Score(float(index), float(index))

    outcomes, _ = asyncio.run(score_with(function, num_samples=5))
    assert [scored(outcome).reward for outcome in outcomes] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_policy_fault_is_a_score_of_its_penalty() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return PolicyFault("wrote to /etc", -2.0)

    (outcome,), _ = asyncio.run(score_with(function))
    assert scored(outcome) == Score(-2.0, -2.0, {"policy_fault": 1.0})


def test_an_invalid_sample_is_final() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return InvalidSample("no label")

    (outcome,), servicer = asyncio.run(score_with(function))
    assert outcome == InvalidSample("no label")
    assert len(servicer.calls) == 1


def test_a_retryable_failure_is_tried_again_after_its_delay() -> None:
    tries = itertools.count()
    times: list[float] = []

    async def function(call: ScoreCall) -> ScoreOutcome:
        times.append(asyncio.get_running_loop().time())
        return RetryableFailure("busy", 0.15) if next(tries) < 2 else Score(1.0, 1.0)

    (outcome,), servicer = asyncio.run(score_with(function))
    assert scored(outcome).reward == 1.0
    assert all(later - earlier >= 0.14 for earlier, later in itertools.pairwise(times))
    assert len({request.request_id for request in servicer.requests}) == 3


def test_tries_end_and_the_failure_names_the_last_reason() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return RetryableFailure("reward_func raised ValueError: boom")

    (outcome,), servicer = asyncio.run(score_with(function, attempts=2))
    assert isinstance(outcome, ScoringFailedError)
    assert str(outcome) == (
        "the reward server gave no reward in 2 tries: reward_func raised ValueError: boom; correct the cause, or raise "
        "rollout.scoring_attempts"
    )
    assert len(servicer.calls) == 2


def test_a_server_that_never_answers_is_asked_again_and_then_the_sample_fails() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome | None:
        return None

    (outcome,), servicer = asyncio.run(score_with(function, attempts=2, timeout_s=2.0))
    assert isinstance(outcome, ScoringFailedError)
    assert ": no answer within 1 s; " in str(outcome)
    assert len(servicer.calls) == 2


def test_a_delay_beyond_the_time_fails_the_sample_in_time() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return RetryableFailure("come back tomorrow", 86_400.0)

    (outcome,), _ = asyncio.run(asyncio.wait_for(score_with(function, timeout_s=1.0), 20.0))
    assert isinstance(outcome, ScoringFailedError)
    assert "within 1 s: come back tomorrow; find out what delays the server, or raise rollout.scoring_timeout_s" in str(
        outcome
    )


def test_one_try_is_not_called_tries() -> None:
    async def function(call: ScoreCall) -> ScoreOutcome:
        return RetryableFailure("busy")

    (outcome,), _ = asyncio.run(score_with(function, attempts=1))
    assert "the reward server gave no reward in 1 try: busy; " in str(outcome)


def test_a_sample_that_is_slow_to_score_holds_up_no_other() -> None:
    release = asyncio.Event()

    async def function(call: ScoreCall) -> ScoreOutcome:
        if call.sample.index == 0:
            await release.wait()
        return Score(1.0, 1.0)

    async def scenario() -> None:
        servicer = FakeRewardServicer(function)
        async with reward_server(servicer) as server:
            client = RewardClient(server.address)
            await client.connect(5.0)
            scorer = Scorer(client, None, attempts=1, timeout_s=10.0)
            slow = asyncio.ensure_future(scorer.score(score_call(0), None))
            for index in range(1, 6):
                scored(await scorer.score(score_call(index), None))
            assert not slow.done()
            assert scorer.num_scoring == 1
            release.set()
            scored(await slow)
            await client.close()

    asyncio.run(scenario())


def test_a_restarted_server_gets_the_samples_again_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    async def never(call: ScoreCall) -> ScoreOutcome | None:
        return None

    async def scenario() -> None:
        first = FakeRewardServicer(never)
        server = reward_server(first)
        await server.__aenter__()
        client = RewardClient(server.address)
        await client.connect(5.0)
        scorer = Scorer(client, None, attempts=1, timeout_s=20.0)
        samples = [asyncio.ensure_future(scorer.score(score_call(index), None)) for index in range(8)]
        await until(lambda: len(first.calls) == 8)
        await server.stop()
        await asyncio.sleep(0.3)
        second = FakeRewardServicer()
        async with reward_server(second, server.address):
            for outcome in await asyncio.wait_for(asyncio.gather(*samples), 30.0):
                assert scored(outcome).reward == 1.0
            assert len(second.calls) == 8
            await client.close()

    with caplog.at_level(logging.INFO, "services.rollout.scoring"):
        asyncio.run(scenario())
    messages = [record.getMessage() for record in caplog.records if record.name == "services.rollout.scoring"]
    assert len([message for message in messages if "cannot be reached" in message]) == 1
    assert len([message for message in messages if "answers again" in message]) == 1


def test_a_server_that_stays_away_fails_the_sample_in_time_with_the_reason() -> None:
    async def scenario() -> None:
        server = reward_server(FakeRewardServicer())
        await server.__aenter__()
        client = RewardClient(server.address)
        await client.connect(5.0)
        await server.stop()
        scorer = Scorer(client, None, attempts=2, timeout_s=0.8)
        with pytest.raises(ScoringFailedError, match="reward server"):
            await asyncio.wait_for(scorer.score(score_call(), None), 20.0)
        await client.close()

    asyncio.run(scenario())


def test_reference_logprobs_come_with_the_score_at_the_samples_temperature() -> None:
    async def scenario() -> None:
        servicer = FakeReferenceServicer()
        async with reward_server(FakeRewardServicer()) as reward, reference_server(servicer) as reference:
            reward_client, reference_client = RewardClient(reward.address), ReferenceClient(reference.address)
            await reward_client.connect(5.0)
            scorer = Scorer(reward_client, reference_client, attempts=1, timeout_s=10.0)
            outcome = await scorer.score(score_call(), 0.7)
            assert isinstance(outcome, Sample)
            assert outcome.reference_logprobs is not None
            assert outcome.reference_logprobs.tolist() == [-2.0, -2.0, -2.0]
            (call,) = servicer.calls
            assert call.token_ids.tolist() == [1, 2, 3, 4, 5]
            assert call.num_prompt_tokens == 2
            assert call.temperature == pytest.approx(0.7)
            without = await scorer.score(score_call(), None)
            assert isinstance(without, Sample)
            assert without.reference_logprobs is None
            await reward_client.close()
            await reference_client.close()

    asyncio.run(scenario())


def test_a_sample_that_the_reference_refuses_is_invalid_though_it_has_a_score() -> None:
    async def refuse(call: LogProbsCall) -> Float32Array | RetryableFailure | InvalidSample:
        return InvalidSample("token 99 is outside the vocabulary")

    async def scenario() -> None:
        async with (
            reward_server(FakeRewardServicer()) as reward,
            reference_server(FakeReferenceServicer(refuse)) as reference,
        ):
            reward_client, reference_client = RewardClient(reward.address), ReferenceClient(reference.address)
            await reward_client.connect(5.0)
            scorer = Scorer(reward_client, reference_client, attempts=1, timeout_s=10.0)
            assert await scorer.score(score_call(), 1.0) == InvalidSample("token 99 is outside the vocabulary")
            await reward_client.close()
            await reference_client.close()

    asyncio.run(scenario())


def test_an_answer_that_breaks_the_contract_is_a_failure_and_never_a_score() -> None:
    async def too_long(call: LogProbsCall) -> Float32Array:
        return np.zeros(call.num_response_tokens + 1, np.float32)

    async def scenario() -> None:
        async with (
            reward_server(FakeRewardServicer()) as reward,
            reference_server(FakeReferenceServicer(too_long)) as reference,
        ):
            reward_client, reference_client = RewardClient(reward.address), ReferenceClient(reference.address)
            await reward_client.connect(5.0)
            scorer = Scorer(reward_client, reference_client, attempts=1, timeout_s=10.0)
            with pytest.raises(ScoringFailedError, match="has 4 entries for 3 tokens"):
                await scorer.score(score_call(), 1.0)
            await reward_client.close()
            await reference_client.close()

    asyncio.run(scenario())


def test_what_is_no_reward_server_is_told_at_connection() -> None:
    async def scenario() -> None:
        async with reference_server(FakeReferenceServicer()) as server:
            client = RewardClient(server.address)
            with pytest.raises(ConfigError, match=r"reward\.address: .* does not serve"):
                await client.connect(5.0)
            await client.close()

    asyncio.run(scenario())


def test_nobody_at_the_address_is_told_within_the_time() -> None:
    async def scenario() -> None:
        server = reward_server(FakeRewardServicer())
        await server.__aenter__()
        await server.stop()
        client = RewardClient(server.address)
        with pytest.raises(UnavailableError, match="reward server"):
            await asyncio.wait_for(client.connect(0.5), 20.0)
        await client.close()

    asyncio.run(scenario())
