"""Evaluation rounds on virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from rollmesh.types import EvaluationResult, PolicyVersion, StopReason
from services.coordinator.evaluation import EvaluationRound, Evaluator
from tests.unit.coordinator.harness import evaluation_sample

TTL_S = 100.0


class Rig:
    """An evaluator with a clock in the test's hand, and what it reported."""

    def __init__(
        self,
        num_prompts: int = 4,
        every_steps: int = 10,
        last_step: int = 25,
        should_pin: bool = True,
        evaluated_steps: Sequence[int] = (),
    ) -> None:
        self.now = 0.0
        self.rounds: list[EvaluationRound] = []
        self.results: list[EvaluationResult] = []
        self.gone_back_to: list[int] = []
        self.evaluator = Evaluator(
            num_prompts,
            every_steps,
            last_step,
            should_pin,
            TTL_S,
            2,
            lambda: self.now,
            1,
            evaluated_steps,
            self._on_result,
            self.gone_back_to.append,
        )

    def _on_result(self, finished: EvaluationRound, result: EvaluationResult) -> None:
        self.rounds.append(finished)
        self.results.append(result)

    def commit(self, number: int) -> None:
        self.evaluator.on_commit(PolicyVersion(0, number + 100), number)

    def finish_round(self, score: float = 1.0, version: int = 0) -> None:
        for item, token in self.evaluator.take("rollout-0", 1000):
            assert self.evaluator.report(str(item.prompt_id), token, [evaluation_sample(score, version)])

    @property
    def is_pinned(self) -> bool:
        return not self.evaluator._unpinned.is_set()


def test_rounds_are_due_at_the_first_version_at_multiples_and_at_the_last() -> None:
    rig = Rig()
    for number in range(26):
        rig.commit(number)
        rig.finish_round()
    assert [result.step for result in rig.results] == [0, 10, 20, 25]


def test_a_multiple_whose_version_was_never_committed_is_made_up_for_by_the_next() -> None:
    rig = Rig()
    for number in (0, 9, 11, 12):
        rig.commit(number)
        rig.finish_round()
    assert [result.step for result in rig.results] == [0, 11]


def test_the_last_step_is_evaluated_once_even_if_the_run_ends_early() -> None:
    rig = Rig()
    rig.commit(0)
    rig.finish_round()
    rig.commit(7)
    assert rig.evaluator.is_idle
    rig.evaluator.on_last_step(PolicyVersion(0, 107), 7)
    rig.finish_round()
    rig.evaluator.on_last_step(PolicyVersion(0, 107), 7)
    assert rig.evaluator.is_idle
    assert [result.step for result in rig.results] == [0, 7]


def test_a_run_that_goes_on_evaluates_what_was_not_evaluated_yet() -> None:
    rig = Rig(evaluated_steps=(0, 10))
    rig.commit(14)
    assert rig.evaluator.is_idle
    rig.commit(20)
    rig.finish_round()
    assert [result.step for result in rig.results] == [20]
    assert rig.gone_back_to == []


def test_rounds_of_steps_that_a_learner_went_back_behind_are_void_and_made_again() -> None:
    rig = Rig(evaluated_steps=(0, 10))
    rig.commit(20)
    assert rig.is_pinned
    rig.commit(8)
    assert rig.gone_back_to == [8]
    assert rig.evaluator.is_idle
    assert not rig.is_pinned
    for step in (10, 20):
        rig.commit(step)
        rig.finish_round()
    assert [result.step for result in rig.results] == [10, 20]


def test_a_round_of_the_step_to_which_a_learner_went_back_goes_on() -> None:
    rig = Rig(should_pin=False)
    rig.commit(0)
    rig.commit(20)
    rig.commit(0)
    rig.finish_round()
    assert [result.step for result in rig.results] == [0]
    assert rig.evaluator.is_idle


def test_a_finished_run_that_is_resumed_is_not_evaluated_twice() -> None:
    rig = Rig(evaluated_steps=(0, 10, 20, 25))
    rig.commit(25)
    rig.evaluator.on_last_step(PolicyVersion(0, 125), 25)
    assert rig.evaluator.is_idle


def test_a_round_that_falls_due_during_another_starts_after_it() -> None:
    rig = Rig(should_pin=False)
    rig.commit(0)
    rig.commit(10)
    assert rig.evaluator.version == PolicyVersion(0, 100)
    rig.finish_round()
    assert rig.evaluator.version == PolicyVersion(0, 110)


def test_a_round_pins_its_version_for_no_longer_than_a_lease_lives() -> None:
    rig = Rig()
    assert not rig.is_pinned
    rig.commit(0)
    assert rig.is_pinned
    rig.now = TTL_S + 1
    rig.evaluator.expire()
    assert not rig.is_pinned
    rig.finish_round()
    assert len(rig.results) == 1


def test_without_pinning_nothing_waits() -> None:
    rig = Rig(should_pin=False)
    rig.commit(0)
    asyncio.run(asyncio.wait_for(rig.evaluator.until_unpinned(), 20))


def test_expired_and_revoked_leases_are_given_again_until_the_attempts_are_used_up() -> None:
    rig = Rig(num_prompts=2)
    rig.commit(0)
    (first, _), (second, second_token) = rig.evaluator.take("rollout-0", 2)
    rig.now = TTL_S
    rig.evaluator.expire()
    assert rig.evaluator.num_waiting == 2
    again = rig.evaluator.take("rollout-1", 2)
    assert {item.attempt for item, _ in again} == {1}
    assert not rig.evaluator.report(str(second.prompt_id), second_token, [evaluation_sample(1.0)])
    rig.evaluator.revoke("rollout-1")
    assert first.failure == "rollout-1 is gone"
    assert (rig.results[0].num_prompts, rig.results[0].num_failed, rig.results[0].pass_at_1) == (2, 2, 0.0)


def test_a_result_counts_once() -> None:
    rig = Rig(num_prompts=2)
    rig.commit(0)
    (item, token), _ = rig.evaluator.take("rollout-0", 2)
    assert rig.evaluator.report(str(item.prompt_id), token, [evaluation_sample(1.0)])
    assert not rig.evaluator.report(str(item.prompt_id), token, [evaluation_sample(0.0)])
    assert rig.evaluator.num_open == 1


def test_the_figures_are_means_over_prompts_with_their_standard_error() -> None:
    rig = Rig(num_prompts=3)
    rig.commit(0)
    scores = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
    for (item, token), pair in zip(rig.evaluator.take("rollout-0", 3), scores, strict=True):
        samples = [evaluation_sample(pair[0]), evaluation_sample(pair[1], stop=StopReason.LENGTH)]
        rig.evaluator.report(str(item.prompt_id), token, samples)
    [result] = rig.results
    assert result.pass_at_1 == pytest.approx(0.5)
    assert result.pass_at_1_stderr == pytest.approx(0.5 / math.sqrt(3))
    assert result.truncation_rate == pytest.approx(0.5)
    assert result.mean_generated_tokens == 10


def test_samples_of_other_versions_are_counted() -> None:
    rig = Rig(num_prompts=2, should_pin=False)
    rig.commit(0)
    rig.finish_round(version=3)
    assert rig.rounds[0].num_other_versions == 2
