"""The learner's side of the queue, for a thread that may block.

::

    READY ──take_batch──► BATCHED ──mark_trained──► TRAINED ──retire──► RETIRED
                             │ payloads

`take_batch` waits until the window (see `staleness`, and ``scripts/take.lua``) lets it take a whole batch. Three events
wake it: a commit that leaves enough groups READY for a batch, a group that FAILED or was FILTERED, and the closing of
the ledger. It also looks every two seconds. Every rank reads the payloads of its own share with an intake of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis import Redis

from rollmesh.errors import DeadlineError, InvalidArgumentError, ReplayError, SupersededError, UnavailableError
from rollmesh.replay.codec import decode_group
from rollmesh.replay.connection import translate_errors
from rollmesh.replay.keys import Keys
from rollmesh.replay.rows import GroupRow, parse_row
from rollmesh.replay.scripts import source
from rollmesh.types import Group, GroupState

_LONGEST_WAIT_S = 2.0
"""The longest blocking read. It ends before the socket's timeout, at which the client would report a failure."""
_PAUSE_S = 0.2
"""Time between two tries while Redis does not answer."""
_PAYLOADS_PER_CALL = 16
_MOVED_PER_CALL = 100


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups of one step, in the order of the line. ``is_last``: no batch follows."""

    step: int
    rows: tuple[GroupRow, ...]
    is_last: bool


class TakenOver(NamedTuple):
    """What a learner that took the queue over has to train again: groups that are READY, and groups that are PENDING
    because their samples are no longer there."""

    num_ready: int
    num_pending: int


class BatchQueue:
    """The queue of one run, seen by the learner.

    Every method may raise UnavailableError (Redis is away: try again), ReplayError, and SupersededError (another
    learner has taken over).

    Args:
        redis: from `connection.connect_blocking`; the caller closes it.
        run_id: names the run's keys.
    """

    def __init__(self, redis: Redis, run_id: str) -> None:
        self._redis = redis
        self._keys = Keys(run_id)
        self._scripts = {name: redis.register_script(source(name)) for name in ("take_over", "take", "train", "retire")}
        self._term = "0"
        socket_timeout_s = redis.connection_pool.connection_kwargs.get("socket_timeout") or 2 * _LONGEST_WAIT_S
        self._wait_s = min(_LONGEST_WAIT_S, socket_timeout_s / 2)

    def possible_starts(self) -> range:
        """The steps after which a learner can take over: the groups of all later steps are there to be trained again,
        and the ledger knows the steps up to it."""
        fields = ["payloads_gone_step", "retired_step", "taken_step"]
        with translate_errors():
            known: Any = self._redis.hmget(self._keys.meta, fields)
        gone, retired, taken = (int(value or 0) for value in known)
        return range(max(gone, retired), taken + 1)

    def make_durable(self) -> bool:
        """Wait until the server has what was written so far on its disk, so that a power cut does not take it back.

        Returns:
            Whether the server said so: not where it keeps no append-only file, or is older than Redis 7.2.
        """
        try:
            with translate_errors():
                answer: Any = self._redis.waitaof(1, 0, round(_LONGEST_WAIT_S * 1000))
        except ReplayError:
            return False
        return int(answer[0]) >= 1

    def take_over(self, step: int) -> TakenOver:
        """Become the run's learner, which has the policy that ``step`` made and goes on with the next step.

        What later steps took is trained again: groups whose payload is there are READY, the others PENDING, each at its
        old place in the line. A learner that took over earlier is refused from now on.

        Args:
            step: the step that a checkpoint covers; 0 for the model as it was given.

        Raises:
            ReplayError: groups of later steps are retired, or the ledger knows fewer steps. Nothing has changed.
            SupersededError: another learner took over meanwhile.
        """
        term, num_ready, num_pending = "", 0, 0
        while True:
            answer = self._run("take_over", step, _MOVED_PER_CALL, self._keys.batch_prefix, term)
            term = answer[0].decode()
            num_ready, num_pending = num_ready + answer[1], num_pending + answer[2]
            if answer[3] < _MOVED_PER_CALL:
                self._term = term
                return TakenOver(num_ready, num_pending)

    def take_batch(
        self, step: int, size: int, window: int, timeout_s: float, lineage: int = 0, lowest_number: int = 0
    ) -> Batch | None:
        """The ``size`` groups that ``step`` trains on; the same ones when asked again.

        Args:
            window: places of the line, from `StalenessWindow.size`.
            lineage: of the learner's version.
            lowest_number: a group of an older lineage, with a token of a version before this number, is generated
                again.

        Returns:
            None when the ledger is closed and nothing is left. The last batch may be smaller than ``size``.

        Raises:
            DeadlineError: there was no batch for ``timeout_s`` seconds, or Redis did not answer for so long.
            ReplayError: the groups of the step are retired.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            unavailable: UnavailableError | None = None
            try:
                answer, *rest = self._run(
                    "take", self._keys.batch(step), step, size, window, self._term, lineage, lowest_number
                )
                if answer == b"end":
                    return None
                if answer == b"batch":
                    return Batch(step, tuple(_parse_committed(row) for row in rest[1:]), bool(rest[0]))
                self._sleep_until_woken(deadline)
            except UnavailableError as error:
                unavailable = error
                time.sleep(_PAUSE_S)
            if time.monotonic() >= deadline:
                state = str(unavailable) if unavailable else self._describe()
                raise DeadlineError(f"no batch of {size} groups for step {step} in {timeout_s:g} s: {state}")

    def _sleep_until_woken(self, deadline: float) -> None:
        remaining_s = deadline - time.monotonic()
        if remaining_s > 0:
            with translate_errors():
                self._redis.blpop([self._keys.wake], timeout=min(self._wait_s, max(remaining_s, 0.01)))

    def _describe(self) -> str:
        states = (GroupState.PENDING, GroupState.LEASED, GroupState.READY)
        with translate_errors():
            counts = [self._redis.zcard(self._keys.index(state)) for state in states]
        return ", ".join(f"{count} {state.value}" for state, count in zip(states, counts, strict=True))

    def num_filtered(self) -> int:
        """Groups FILTERED so far in the run. O(1)."""
        with translate_errors():
            with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.zcard(self._keys.index(GroupState.FILTERED))
                pipeline.hget(self._keys.totals, GroupState.FILTERED.value)
                num_with_row, num_without = pipeline.execute()
            return int(num_with_row) + int(num_without or 0)

    def payloads(self, group_ids: Sequence[str]) -> list[Group]:
        """Read groups of a batch, in this order, some at a time.

        Raises:
            ReplayError: a group has no payload, or one that cannot be read.
        """
        return [
            group
            for start in range(0, len(group_ids), _PAYLOADS_PER_CALL)
            for group in self._read(group_ids[start : start + _PAYLOADS_PER_CALL])
        ]

    def _read(self, group_ids: Sequence[str]) -> Iterator[Group]:
        with translate_errors():
            with self._redis.pipeline(transaction=False) as pipeline:
                for group_id in group_ids:
                    pipeline.hget(self._keys.row(group_id), "payload")
                keys = pipeline.execute()
            payloads: list[Any] = self._redis.mget([key or b"" for key in keys])
        for group_id, payload in zip(group_ids, payloads, strict=True):
            if payload is None:
                raise ReplayError(f"group {group_id} has no payload")
            try:
                group = decode_group(payload)
            except InvalidArgumentError as error:
                raise ReplayError(f"the payload of group {group_id} cannot be read: {error}") from error
            if group.group_id != group_id:
                raise ReplayError(f"the payload of group {group_id} is of group {group.group_id}")
            yield group

    def mark_trained(self, step: int) -> int:
        """Say that the optimiser has stepped on the batch of ``step``. Returns the batch's size.

        Raises:
            ReplayError: the step never took a batch.
        """
        num_groups = int(self._run("train", self._keys.batch(step), step, self._term))
        if num_groups == 0:
            raise ReplayError(f"step {step} was marked trained but never took a batch")
        return num_groups

    def retire(self, through_step: int) -> int:
        """Drop the payloads of what steps up to ``through_step`` trained, once no learner will go back to those steps.

        The rows follow when enough later groups have ended. The steps cannot be taken or marked again.

        Returns:
            How many groups retired by this call.
        """
        num_groups = 0
        while True:
            num_retired = int(self._run("retire", through_step, _MOVED_PER_CALL, self._keys.batch_prefix, self._term))
            num_groups += num_retired
            if num_retired < _MOVED_PER_CALL:
                return num_groups

    def _run(self, name: str, *arguments: str | int) -> Any:
        try:
            with translate_errors():
                return self._scripts[name](keys=self._keys.for_scripts, args=(self._keys.row_prefix, *arguments))
        except ReplayError as error:
            taken_over = "another learner has taken the queue over"
            if taken_over in str(error):
                raise SupersededError(f"{taken_over}, and this one is no longer heard") from error
            raise


def _parse_committed(reply: Sequence[bytes]) -> GroupRow:
    row = parse_row(reply)
    if row.oldest_version is None:
        raise ReplayError(f"group {row.group_id} is in a batch but was never committed")
    return row
