"""Evaluation rounds: held-out prompts, sampled by the serving policy while training goes on.

::

    version committed ──► round due ──► items waiting ── take ──► leased ── report ──► done
                                            ▲                       │
                                            │                       │    (renew: the lease lives on)
                                            └── expired, revoked ────┘   (at most max_attempts, then failed)

A round is kept in memory only. While it lasts it *pins* its version, if so configured: the next publish waits for
`until_unpinned`. No I/O here; time is a function that the caller gives.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rollmesh.telemetry.details import Details
from rollmesh.types import EvaluationResult, EvaluationSample, PolicyVersion, PromptId, StopReason
from services.coordinator.members import Clock

logger = logging.getLogger(__name__)


@dataclass
class EvaluationItem:
    """One prompt of a round. ``fencing_token`` is 0 while nobody holds it."""

    prompt_id: PromptId
    attempt: int = 0
    fencing_token: int = 0
    member: str = ""
    deadline_s: float = math.inf
    datasource: str = ""
    samples: tuple[EvaluationSample, ...] | None = None
    failure: str = ""

    @property
    def is_over(self) -> bool:
        return self.samples is not None or bool(self.failure)


@dataclass
class EvaluationRound:
    """The prompts of one evaluation. ``step`` made the version."""

    version: PolicyVersion
    step: int
    started_s: float
    items: dict[str, EvaluationItem]
    waiting: deque[str] = field(default_factory=deque)
    num_open: int = 0

    @property
    def num_other_versions(self) -> int:
        """Samples with a token of another version than the round's: 0 where versions are pinned."""
        samples = [sample for item in self.items.values() for sample in item.samples or ()]
        return sum({sample.oldest_version, sample.newest_version} != {self.version} for sample in samples)


class Evaluator:
    """At most one round at a time; one that falls due meanwhile starts afterwards, with the version of then.

    Args:
        num_prompts: rows of the evaluation dataset.
        every_steps: a round is due whenever the step that made a version reaches or passes a multiple of it.
        last_step: the step that ends the run; its version is evaluated too.
        should_pin: whether rounds hold the next version back.
        ttl_s: life of a lease from its last renewal, and the longest time that a round holds a version back.
        max_attempts: leases of one prompt before it counts as failed.
        clock: monotonic seconds.
        first_token: first fencing token; larger than any that an earlier coordinator gave out.
        evaluated_steps: steps of the rounds that an earlier coordinator finished, ascending.
        on_result: called with each finished round.
        on_going_back: called with the step to which a learner went back: later rounds are void.
    """

    def __init__(
        self,
        num_prompts: int,
        every_steps: int,
        last_step: int,
        should_pin: bool,
        ttl_s: float,
        max_attempts: int,
        clock: Clock,
        first_token: int,
        evaluated_steps: Sequence[int],
        on_result: Callable[[EvaluationRound, EvaluationResult], None],
        on_going_back: Callable[[int], None],
    ) -> None:
        self._num_prompts = num_prompts
        self._every_steps = every_steps
        self._last_step = last_step
        self._should_pin = should_pin
        self._ttl_s = ttl_s
        self._max_attempts = max_attempts
        self._clock = clock
        self._next_token = first_token
        self._on_result = on_result
        self._on_going_back = on_going_back
        self._round: EvaluationRound | None = None
        self._due: tuple[PolicyVersion, int] | None = None
        self._steps = list(evaluated_steps)
        self._unpinned = asyncio.Event()
        self._unpinned.set()
        self.last_result: EvaluationResult | None = None

    @property
    def is_idle(self) -> bool:
        """Neither a round under way nor one due."""
        return self._round is None and self._due is None

    @property
    def version(self) -> PolicyVersion | None:
        """Of the round under way."""
        return None if self._round is None else self._round.version

    @property
    def num_open(self) -> int:
        """Prompts of the round under way that have no result yet."""
        return 0 if self._round is None else self._round.num_open

    @property
    def num_waiting(self) -> int:
        """Of those, the ones that nobody holds."""
        return 0 if self._round is None else len(self._round.waiting)

    def leases_of(self, member: str) -> list[EvaluationItem]:
        """The prompts that a member holds."""
        items = () if self._round is None else self._round.items.values()
        return [item for item in items if item.member == member and item.fencing_token != 0]

    def on_commit(self, version: PolicyVersion, step: int) -> None:
        """A version serves now, which ``step`` made: starts a round, if one is due for it."""
        if self._steps and step < self._steps[-1]:
            self._go_back(step)
        last = self._steps[-1] if self._steps else None
        if last == step:
            return
        if last is None or step == self._last_step or step // self._every_steps > last // self._every_steps:
            self._schedule(version, step)

    def on_last_step(self, version: PolicyVersion | None, step: int) -> None:
        """The run trains no further: what serves now is evaluated, if it was not."""
        if version is not None and step not in self._steps[-1:]:
            self._schedule(version, step)

    def _go_back(self, step: int) -> None:
        """A learner went back to ``step``: rounds of later steps are void, also the one under way."""
        self._steps = [known for known in self._steps if known <= step]
        self._due = None
        if self._round is not None and self._round.step > step:
            self._round = None
            self._unpinned.set()
        if self.last_result is not None and self.last_result.step > step:
            self.last_result = None
        self._on_going_back(step)

    def take(self, member: str, limit: int) -> list[tuple[EvaluationItem, int]]:
        """Lease up to ``limit`` waiting prompts; returns (item, fencing token) of each."""
        if self._round is None:
            return []
        taken = []
        for _ in range(min(limit, len(self._round.waiting))):
            item = self._round.items[self._round.waiting.popleft()]
            item.fencing_token, item.member = self._next_token, member
            item.deadline_s = self._clock() + self._ttl_s
            self._next_token += 1
            taken.append((item, item.fencing_token))
        return taken

    def report(self, group_id: str, fencing_token: int, samples: Sequence[EvaluationSample], failure: str = "") -> bool:
        """Take a result. Returns whether it counted: a repeated one, or one of an old lease, does not."""
        item = None if self._round is None else self._round.items.get(group_id)
        if item is None or item.is_over or item.fencing_token != fencing_token:
            logger.info("dropped a late evaluation result", extra={"group": group_id})
            return False
        if failure or not samples:
            self._end_attempt(item, failure or "no sample was left")
        else:
            item.samples, item.fencing_token = tuple(samples), 0
            self._end(item)
        return True

    def renew(self, group_id: str, fencing_token: int) -> bool:
        """Let a lease live on, from now; False where it is over."""
        item = None if self._round is None else self._round.items.get(group_id)
        if item is None or item.fencing_token != fencing_token or item.deadline_s <= self._clock():
            return False
        item.deadline_s = self._clock() + self._ttl_s
        return True

    def seconds_left(self, item: EvaluationItem) -> float:
        """The time until a lease expires."""
        return item.deadline_s - self._clock()

    def fail(self, item: EvaluationItem, reason: str) -> None:
        """A leased prompt fails at once, because another try would fail as well."""
        item.attempt = self._max_attempts
        self._end_attempt(item, reason)

    def expire(self) -> None:
        """End the leases whose time is over, and the pin of a round that takes too long."""
        if self._round is None:
            return
        now = self._clock()
        if not self._unpinned.is_set() and now - self._round.started_s > self._ttl_s:
            logger.warning("evaluation of version %s takes longer than a lease lives; unpinned", self._round.version)
            self._unpinned.set()
        for item in list(self._round.items.values()):
            if item.fencing_token and item.deadline_s <= now:
                self._end_attempt(item, f"the lease of {item.member} expired")

    def revoke(self, member: str) -> None:
        """The member is gone: what it held waits again."""
        for item in self.leases_of(member):
            self._end_attempt(item, f"{member} is gone")

    async def until_unpinned(self) -> None:
        """Wait until the next version may be committed; `expire` bounds it."""
        await self._unpinned.wait()

    def _schedule(self, version: PolicyVersion, step: int) -> None:
        self._steps.append(step)
        if self._round is not None:
            self._due = version, step
        else:
            self._start(version, step)

    def _start(self, version: PolicyVersion, step: int) -> None:
        prompts = [PromptId("eval", step, index) for index in range(self._num_prompts)]
        items = {str(prompt): EvaluationItem(prompt) for prompt in prompts}
        self._round = EvaluationRound(version, step, self._clock(), items, deque(items), len(items))
        self._due = None
        if self._should_pin:
            self._unpinned.clear()

    def _end_attempt(self, item: EvaluationItem, reason: str) -> None:
        assert self._round is not None
        item.attempt += 1
        item.fencing_token, item.deadline_s = 0, math.inf
        if item.attempt < self._max_attempts:
            self._round.waiting.appendleft(str(item.prompt_id))
            return
        item.failure = reason
        logger.warning("an evaluation prompt failed: %s", reason, extra={"group": str(item.prompt_id)})
        self._end(item)

    def _end(self, item: EvaluationItem) -> None:
        assert self._round is not None
        self._round.num_open -= 1
        if self._round.num_open:
            return
        finished, self._round = self._round, None
        self._unpinned.set()
        self.last_result = summarize(finished)
        self._on_result(finished, self.last_result)
        if self._due is not None:
            self._start(*self._due)


def summarize(finished: EvaluationRound) -> EvaluationResult:
    """The figures of a round. ``pass_at_1`` is the mean over prompts of the mean score of their samples, its standard
    error the sample deviation of those means over √prompts; failed prompts are left out of both."""
    groups = [item.samples for item in finished.items.values() if item.samples]
    samples = [sample for group in groups for sample in group]
    means = [statistics.fmean(sample.score for sample in group) for group in groups]
    return EvaluationResult(
        version=finished.version,
        step=finished.step,
        num_prompts=len(finished.items),
        num_failed=len(finished.items) - len(groups),
        pass_at_1=statistics.fmean(means) if means else 0.0,
        pass_at_1_stderr=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0,
        mean_generated_tokens=statistics.fmean(s.num_generated_tokens for s in samples) if samples else 0.0,
        truncation_rate=statistics.fmean(s.stop_reason is StopReason.LENGTH for s in samples) if samples else 0.0,
        details=_details(finished),
    )


def _details(finished: EvaluationRound) -> dict[str, float]:
    details = Details()
    for item in finished.items.values():
        for sample in item.samples or ():
            details.add_sample(item.datasource, sample.reward, sample.score, sample.extra_logs)
    return details.metrics()
