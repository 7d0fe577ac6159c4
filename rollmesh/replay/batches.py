"""The learner's side of the queue, for a thread that may block.

::

    READY ──take_batch──► BATCHED ──mark_trained──► TRAINED ──retire──► RETIRED
                             │ payloads

`take_batch` waits until the window (see `staleness`, and ``scripts/take.lua``) contains a whole batch. Three events
wake `take_batch`: a commit that leaves enough groups READY for a batch, a group that FAILED or was FILTERED, and the
closing of the ledger. Without an event `take_batch` looks every two seconds. Every rank has a `BatchQueue` of its own,
with which the rank reads the payloads of its share.
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
"""The longest blocking read. The read ends before the socket's timeout, which the client would report as a failure."""
_PAUSE_S = 0.2
"""Time between two tries while Redis does not answer."""
_PAYLOADS_PER_CALL = 16
_MOVED_PER_CALL = 100


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of the groups of one step, in the order of the line. ``is_last``: no batch follows."""

    step: int
    rows: tuple[GroupRow, ...]
    is_last: bool


class TakenOver(NamedTuple):
    """The groups that a learner trains again after it took the queue over.

    Attributes:
        num_ready: groups whose payload is still there.
        num_pending: groups that are generated again, because their payload is gone.
    """

    num_ready: int
    num_pending: int


class BatchQueue:
    """The queue of one run, as the learner uses it.

    Every method may raise UnavailableError (Redis is away: try again), ReplayError, and SupersededError (another
    learner has taken the queue over).

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
        """Return the steps after which a learner can take the queue over.

        After such a step, the groups of all later steps can be trained again, and the ledger knows the step itself. If
        the groups of step 3 are retired and step 7 took the newest batch, the steps 3 to 7 are returned.
        """
        fields = ["payloads_gone_step", "retired_step", "taken_step"]
        with translate_errors():
            known: Any = self._redis.hmget(self._keys.meta, fields)
        gone, retired, taken = (int(value or 0) for value in known)
        return range(max(gone, retired), taken + 1)

    def make_durable(self) -> bool:
        """Wait until the server has all writes so far on its disk, so that a power cut does not undo them.

        Returns:
            Whether the server confirmed it. A server without an append-only file, or older than Redis 7.2, does not.
        """
        try:
            with translate_errors():
                answer: Any = self._redis.waitaof(1, 0, round(_LONGEST_WAIT_S * 1000))
        except ReplayError:
            return False
        return int(answer[0]) >= 1

    def take_over(self, step: int) -> TakenOver:
        """Become the run's learner. The learner has the policy that ``step`` made, and goes on with the next step.

        The groups of later steps are trained again, each at its old place in the line: a group whose payload is still
        there becomes READY, every other group becomes PENDING. Learners that took over earlier are refused.

        Args:
            step: the last step that the checkpoint covers; 0 for the initial model.

        Raises:
            ReplayError: groups of later steps are retired, or the ledger does not know ``step``. Nothing has changed.
            SupersededError: another learner took the queue over meanwhile.
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
        """Return the ``size`` groups that ``step`` trains on. A repeated call returns the same groups.

        Args:
            window: size of the window in places of the line: `StalenessWindow.size`.
            timeout_s: longest wait for the batch.
            lineage: the lineage of the learner's version.
            lowest_number: a group of an older lineage is generated again if the number of its oldest version is lower.

        Returns:
            The batch; the last batch may be smaller than ``size``. None if the ledger is closed and no group is left.

        Raises:
            DeadlineError: there was no batch for ``timeout_s`` seconds, or Redis did not answer for that time.
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
        """Return the number of groups that were FILTERED so far in the run. O(1)."""
        with translate_errors():
            with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.zcard(self._keys.index(GroupState.FILTERED))
                pipeline.hget(self._keys.totals, GroupState.FILTERED.value)
                num_with_row, num_without = pipeline.execute()
            return int(num_with_row) + int(num_without or 0)

    def payloads(self, group_ids: Sequence[str]) -> list[Group]:
        """Read groups of a batch, in the order of ``group_ids``. One call to Redis reads some of the groups.

        Raises:
            ReplayError: a group has no payload, or its payload cannot be read.
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
        """Record that the optimiser has stepped on the batch of ``step``. Return the batch's size.

        Raises:
            ReplayError: the step never took a batch.
        """
        num_groups = int(self._run("train", self._keys.batch(step), step, self._term))
        if num_groups == 0:
            raise ReplayError(f"step {step} was marked trained but never took a batch")
        return num_groups

    def retire(self, through_step: int) -> int:
        """Drop the payloads of the groups that the steps up to ``through_step`` trained.

        Call this once no learner will go back to those steps: their batches cannot be taken or marked again. The rows
        of the groups go later, when enough other groups have ended.

        Returns:
            The number of groups that this call retired.
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
                raise SupersededError(f"{taken_over}; this learner can change nothing any more") from error
            raise


def _parse_committed(reply: Sequence[bytes]) -> GroupRow:
    row = parse_row(reply)
    if row.oldest_version is None:
        raise ReplayError(f"group {row.group_id} is in a batch but was never committed")
    return row
