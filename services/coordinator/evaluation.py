"""Evaluation rounds: held-out prompts, sampled by the serving policy while training goes on.

::

    version committed ──► round due ──► items waiting ── take ──► leased ── report ──► done
                                            ▲                       │
                                            │                       │    (renew: the lease lives on)
                                            └── expired, revoked ────┘   (at most max_attempts, then failed)

A round exists in memory only. If so configured, a round *pins* its version: the next publish waits for `until_unpinned`
until the round is over. This module does no I/O; the caller gives a clock.
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
    """One prompt of a round. ``fencing_token`` is 0 while no member holds the prompt."""

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
        """Whether the prompt has its result or has failed."""
        return self.samples is not None or bool(self.failure)


@dataclass
class EvaluationRound:
    """The prompts of one evaluation of a version, which ``step`` made."""

    version: PolicyVersion
    step: int
    started_s: float
    items: dict[str, EvaluationItem]
    waiting: deque[str] = field(default_factory=deque)
    num_open: int = 0

    @property
    def num_other_versions(self) -> int:
        """Number of samples with a token of a version other than the round's; 0 where rounds pin their version."""
        samples = [sample for item in self.items.values() for sample in item.samples or ()]
        return sum({sample.oldest_version, sample.newest_version} != {self.version} for sample in samples)


class Evaluator:
    """Runs one round at a time. If a round falls due during a round, it starts afterwards, for the newest due version.

    Args:
        num_prompts: rows of the evaluation dataset.
        every_steps: a round is due when the step of a committed version reaches or passes a multiple of this number.
            With 10, versions of the steps 8, 9 and 12 make one round due: for step 12.
        last_step: the last step of the run; its version is evaluated too.
        should_pin: whether a round holds the next version back.
        ttl_s: seconds that a lease lives from its last renewal, and that a round holds a version back at most.
        max_attempts: leases of one prompt before the prompt counts as failed.
        clock: monotonic seconds.
        first_token: first fencing token; larger than all tokens of earlier coordinators.
        evaluated_steps: steps of the rounds that an earlier coordinator finished, ascending.
        on_result: called with each finished round and its result.
        on_going_back: called with the step to which a learner went back. The rounds of later steps are void.
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
        """Whether no round is under way or due."""
        return self._round is None and self._due is None

    @property
    def version(self) -> PolicyVersion | None:
        """The version that the round under way evaluates; None if there is no round."""
        return None if self._round is None else self._round.version

    @property
    def num_open(self) -> int:
        """Number of prompts of the round under way that have no result yet."""
        return 0 if self._round is None else self._round.num_open

    @property
    def num_waiting(self) -> int:
        """Number of prompts of the round under way that wait for a member."""
        return 0 if self._round is None else len(self._round.waiting)

    def leases_of(self, member: str) -> list[EvaluationItem]:
        """Return the prompts that a member holds."""
        items = () if self._round is None else self._round.items.values()
        return [item for item in items if item.member == member and item.fencing_token != 0]

    def on_commit(self, version: PolicyVersion, step: int) -> None:
        """Start or schedule a round if a round is due for the version that serves now, which ``step`` made."""
        if self._steps and step < self._steps[-1]:
            self._go_back(step)
        last = self._steps[-1] if self._steps else None
        if last == step:
            return
        if last is None or step == self._last_step or step // self._every_steps > last // self._every_steps:
            self._schedule(version, step)

    def on_last_step(self, version: PolicyVersion | None, step: int) -> None:
        """Evaluate the serving version unless it was evaluated before: the run trains no further."""
        if version is not None and step not in self._steps[-1:]:
            self._schedule(version, step)

    def _go_back(self, step: int) -> None:
        """Forget the rounds of steps after ``step``, the round under way included: a learner went back to ``step``."""
        self._steps = [known for known in self._steps if known <= step]
        self._due = None
        if self._round is not None and self._round.step > step:
            self._round = None
            self._unpinned.set()
        if self.last_result is not None and self.last_result.step > step:
            self.last_result = None
        self._on_going_back(step)

    def take(self, member: str, limit: int) -> list[tuple[EvaluationItem, int]]:
        """Lease up to ``limit`` waiting prompts to a member. Return each item with its fencing token."""
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
        """Record a result. Return whether the result counts; a repeated result or one of an old lease does not."""
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
        """Let a lease live for ``ttl_s`` seconds from now. Return False if the lease is over."""
        item = None if self._round is None else self._round.items.get(group_id)
        if item is None or item.fencing_token != fencing_token or item.deadline_s <= self._clock():
            return False
        item.deadline_s = self._clock() + self._ttl_s
        return True

    def seconds_left(self, item: EvaluationItem) -> float:
        """Return the seconds until the lease of an item expires."""
        return item.deadline_s - self._clock()

    def fail(self, item: EvaluationItem, reason: str) -> None:
        """Fail a leased prompt at once, because another attempt would fail as well."""
        item.attempt = self._max_attempts
        self._end_attempt(item, reason)

    def expire(self) -> None:
        """End the leases whose time is up, and the pin of a round that takes longer than ``ttl_s``."""
        if self._round is None:
            return
        now = self._clock()
        if not self._unpinned.is_set() and now - self._round.started_s > self._ttl_s:
            logger.warning(
                "the evaluation of version %s takes longer than a lease lives: it no longer holds a version back",
                self._round.version,
            )
            self._unpinned.set()
        for item in list(self._round.items.values()):
            if item.fencing_token and item.deadline_s <= now:
                self._end_attempt(item, f"the lease of {item.member} expired")

    def revoke(self, member: str) -> None:
        """End the leases of a member that is gone: its prompts wait again."""
        for item in self.leases_of(member):
            self._end_attempt(item, f"{member} is gone")

    async def until_unpinned(self) -> None:
        """Wait until the next version may be committed. `expire` ends the wait after ``ttl_s`` at the latest."""
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
    """Return the figures of a round. Prompts that failed are left out.

    ``pass_at_1`` is the mean over prompts of the mean score of a prompt's samples. ``pass_at_1_stderr`` is the sample
    standard deviation of these means, divided by √(number of prompts). Three prompts with the means 1, 0 and 1 give
    0.667 ± 0.333.
    """
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
