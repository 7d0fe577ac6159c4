"""Scores a finished sample: gets its reward, and the reference's log-probabilities where the KL penalty is on.

::

    Sample ──► reward server ───► Score ──────────────┐
        │                    ───► InvalidSample ──────┼──► Sample with score, or InvalidSample
        └────► reference (KL) ──► log-probs [R] ──────┘

The scorer asks both servers at the same time, over one stream each. Every answer is final except a `RetryableFailure`.
After a `RetryableFailure` the scorer waits for the delay that the server names and tries again. The sample fails when
``attempts`` tries or ``timeout_s`` are used up. A server that cannot be reached uses up time but no tries. No failure
ever becomes a reward.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rollmesh.errors import DeadlineError, RollMeshError, UnavailableError
from rollmesh.rpc.retry import Backoff
from rollmesh.rpc.scorer_clients import ReferenceClient, RewardClient
from rollmesh.types import (
    Float32Array,
    InvalidSample,
    PolicyFault,
    RetryableFailure,
    Sample,
    Score,
)
from rollmesh.wire.outcome import ScoreCall

_logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")


class ScoringFailedError(RollMeshError):
    """A sample got no score within the allowed tries and time."""


class Scorer:
    """Scores many samples at the same time.

    Args:
        reward: the client of the reward server.
        reference: the client of the reference, which computes the frozen policy's log-probabilities; None where the
            run needs none.
        attempts: tries that one sample has with each server.
        timeout_s: time for all tries of one sample with one server. It starts when the sample is complete. One try may
            take ``timeout_s / attempts``: with 120 s and 3 tries, 40 s.
    """

    def __init__(
        self, reward: RewardClient, reference: ReferenceClient | None, *, attempts: int, timeout_s: float
    ) -> None:
        self._reward = _Attempts("reward server", "reward", attempts, timeout_s)
        self._reference = _Attempts("reference", "log-probabilities", attempts, timeout_s)
        self._ask_reward = reward.score
        self._ask_reference = None if reference is None else reference.compute_logprobs
        self.num_scoring = 0
        """The number of samples that wait for an answer."""

    async def score(self, call: ScoreCall, reference_temperature: float | None) -> Sample | InvalidSample:
        """Return the sample of ``call`` with its score, and with the reference's log-probabilities where wanted.

        Args:
            call: the sample, and the texts that the reward server gets with it.
            reference_temperature: the temperature that the sample was drawn with; None does not ask the reference.

        Raises:
            ScoringFailedError: the tries or the time are used up; the message gives the server's last reason.
        """
        self.num_scoring += 1
        try:
            if reference_temperature is None or self._ask_reference is None:
                return _with_score(call.sample, await self._get_score(call), None)
            async with asyncio.TaskGroup() as tasks:
                logprobs = tasks.create_task(self._get_logprobs(call.sample, reference_temperature))
                score = tasks.create_task(self._get_score(call))
            return _with_score(call.sample, score.result(), logprobs.result())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self.num_scoring -= 1

    async def _get_score(self, call: ScoreCall) -> Score | PolicyFault | InvalidSample:
        return await self._reward.get(call.sample.sample_id, lambda timeout_s: self._ask_reward(call, timeout_s))

    async def _get_logprobs(self, sample: Sample, temperature: float) -> Float32Array | InvalidSample:
        ask = self._ask_reference
        assert ask is not None
        return await self._reference.get(sample.sample_id, lambda timeout_s: ask(sample, temperature, timeout_s))


def _with_score(
    sample: Sample, score: Score | PolicyFault | InvalidSample, logprobs: Float32Array | InvalidSample | None
) -> Sample | InvalidSample:
    if isinstance(score, InvalidSample):
        return score
    if isinstance(logprobs, InvalidSample):
        return logprobs
    if isinstance(score, PolicyFault):
        score = Score(reward=score.penalty, score=score.penalty, extra_logs={"policy_fault": 1.0})
    return dataclasses.replace(sample, score=score, reference_logprobs=logprobs)


class _Attempts:
    """The tries with one server. The log shows the beginning and the end of an outage, and not every sample that waits
    for the server."""

    _BACKOFF = Backoff(initial_s=0.05, maximum_s=2.0)

    def __init__(self, scorer: str, answer: str, attempts: int, timeout_s: float) -> None:
        self._scorer = scorer
        self._answer = answer
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._outage = ""

    async def get(self, sample_id: str, ask: Callable[[float], Awaitable[AnswerT | RetryableFailure]]) -> AnswerT:
        """Ask until the server answers. Raises ScoringFailedError when the tries or the time are used up."""
        reason = ""
        try:
            async with asyncio.timeout(self._timeout_s):
                for attempt in range(1, self._attempts + 1):
                    answer = await self._ask_reachable(sample_id, ask)
                    if not isinstance(answer, RetryableFailure):
                        return answer
                    reason = answer.reason
                    self._log_failure(sample_id, attempt, reason)
                    if attempt < self._attempts:
                        await asyncio.sleep(answer.retry_after_s)
        except TimeoutError:
            why = self._outage or reason
            problem = f"the {self._scorer} gave no {self._answer} within {self._timeout_s:g} s" + (why and f": {why}")
            raise ScoringFailedError(
                f"{problem}; find out what delays the server, or raise rollout.scoring_timeout_s"
            ) from None
        tries = "try" if self._attempts == 1 else "tries"
        problem = f"the {self._scorer} gave no {self._answer} in {self._attempts} {tries}: {reason}"
        raise ScoringFailedError(f"{problem}; correct the cause, or raise rollout.scoring_attempts")

    async def _ask_reachable(
        self, sample_id: str, ask: Callable[[float], Awaitable[AnswerT | RetryableFailure]]
    ) -> AnswerT | RetryableFailure:
        """Make one try: wait until the server can be reached, and return its first answer or a missed deadline."""
        pauses = self._BACKOFF.pauses()
        while True:
            try:
                answer = await ask(try_s := self._timeout_s / self._attempts)
            except DeadlineError:
                return RetryableFailure(f"no answer within {try_s:g} s")
            except UnavailableError as error:
                self._note_outage(sample_id, str(error))
                await asyncio.sleep(max(next(pauses), error.retry_after_s))
            else:
                self._note_answer()
                return answer

    def _log_failure(self, sample_id: str, attempt: int, reason: str) -> None:
        message = "%s: try %d of %d failed: %s"
        _logger.info(message, self._scorer, attempt, self._attempts, reason, extra={"sample": sample_id})

    def _note_outage(self, sample_id: str, reason: str) -> None:
        if not self._outage:
            _logger.warning("%s cannot be reached: %s", self._scorer, reason, extra={"sample": sample_id})
        self._outage = reason

    def _note_answer(self) -> None:
        if self._outage:
            _logger.info("%s answers again", self._scorer)
        self._outage = ""
