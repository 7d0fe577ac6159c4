"""The ledger: what everybody may read, and how a rollout worker ends a lease. `CoordinatorLedger` has the other calls.

::

    open_groups ──► PENDING ──lease──► LEASED ──commit──► READY ──► (the learner: `batches`)
                       ▲                 │ │   (renew: the lease lives on)
                       └── expire, ──────┘ ├── give_back (final, or attempts exhausted), expire ──► FAILED
                           revoke,         └── filter_group ─────────────────────────────────────► FILTERED
                           give_back

A group takes a slot when the group is opened. The group keeps the slot until the version into which the group was
trained is committed (`CoordinatorLedger.release_slots`), or until the group is FAILED or FILTERED. A lease is over when
its time is up, even before `CoordinatorLedger.expire_leases` has ended it. Of all workers, only the holder of the
current fencing token moves the group out of LEASED.

A transition costs the server O(log N) per group, where N groups have a row. A group that ended leaves nothing behind in
the long run: its payload goes when the group retires, and the rows of all but the last `scripts.NUM_ENDED_KEPT` ended
groups become totals (`LedgerTotals`). The script that ends a group makes totals of older rows.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from rollmesh.errors import InvalidArgumentError
from rollmesh.replay.codec import encode_group
from rollmesh.replay.commits import CommitLine
from rollmesh.replay.connection import translate_errors
from rollmesh.replay.keys import Keys
from rollmesh.replay.memory import RedisMemory
from rollmesh.replay.rows import GroupRow, parse_row
from rollmesh.replay.scripts import source
from rollmesh.types import Group, GroupState, PolicyVersion

_ANY_NUMBER = 2**31
"""A limit of attempts that no group reaches."""
ROWS_PER_CALL = 100
"""Rows that one script or pipeline handles, so that other clients do not wait for long."""


class CommitOutcome(enum.Enum):
    """How the ledger answered a commit."""

    ACCEPTED = "accepted"
    """The group is stored, and READY."""
    DUPLICATE = "duplicate"
    """The same lease had stored the group before; nothing changed."""
    FENCED = "fenced"
    """The lease is over, or another lease has taken its place; nothing changed, and the payload is dropped."""


@dataclass(frozen=True, slots=True)
class RecordedVersion:
    """A version, and the step that made it."""

    version: PolicyVersion
    step: int


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """The ledger at one moment.

    Attributes:
        num_groups: number of groups in each state; every state has an entry.
        num_slots_used: groups that hold a slot.
        num_opened: groups opened in the run. This is also the place in the line of the next group.
        is_closed: no group will be opened any more.
    """

    num_groups: Mapping[GroupState, int]
    num_slots_used: int
    num_opened: int
    is_closed: bool

    @property
    def num_live(self) -> int:
        """Number of groups that are PENDING, LEASED or READY: groups that are in no batch yet and have not ended."""
        return sum(self.num_groups[state] for state in (GroupState.PENDING, GroupState.LEASED, GroupState.READY))

    @property
    def num_successful(self) -> int:
        """Number of groups that are neither FAILED nor FILTERED so far."""
        return self.num_opened - self.num_groups[GroupState.FAILED] - self.num_groups[GroupState.FILTERED]


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """Figures of the whole run that the ledger keeps beside the rows.

    Attributes:
        num_opened: groups in the run.
        num_steps: number of steps trained.
        num_compacted: number of ended groups without a row, in each state.
        num_retried: number of ended groups without a row that took more than one attempt.
        sequence_sum: sum of the places in the line of the ended groups without a row.
        reasons: (state, reason, number of groups) of the FAILED and FILTERED groups without a row. In a reason, ``…``
            replaces each word with a digit.
    """

    num_opened: int
    num_steps: int
    num_compacted: Mapping[GroupState, int]
    num_retried: int
    sequence_sum: int
    reasons: tuple[tuple[GroupState, str, int], ...]


class Ledger:
    """The ledger of one run as rollout workers and readers use it, for one event loop.

    Every method may raise UnavailableError (Redis is away, or its memory is full: try again) and ReplayError.

    Args:
        redis: from `connection.connect`; the caller closes the client.
        run_id: names the run's keys.
        payload_limit_bytes: a group that packs into more bytes is refused.
        max_attempts: leases of one group before it is FAILED.
    """

    def __init__(
        self, redis: Redis, run_id: str, payload_limit_bytes: int = 512 * 1024 * 1024, max_attempts: int = 3
    ) -> None:
        self._redis = redis
        self._keys = Keys(run_id)
        self._payload_limit_bytes = payload_limit_bytes
        self._max_attempts = max_attempts
        self._scripts = {"give_back": redis.register_script(source("give_back"))}
        self._commits = CommitLine(redis, redis.register_script(source("commit")), self._keys)

    async def is_closed(self) -> bool:
        """Return whether `close` was called."""
        with translate_errors():
            return bool(await self._redis.hexists(self._keys.meta, "closed"))

    async def seconds_left(self, group_ids: Sequence[str]) -> dict[str, float]:
        """Return the seconds until the leases of groups expire, by the clock of the Redis server.

        A group that is not leased has no entry. The time of an expired lease is 0 or negative.
        """
        if not group_ids:
            return {}
        with translate_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.time()
                pipeline.zmscore(self._keys.deadlines, list(group_ids))
                (seconds, microseconds), deadlines_ms = await pipeline.execute()
        now_s = seconds + microseconds / 1e6
        pairs = zip(group_ids, deadlines_ms, strict=True)
        return {group_id: deadline / 1000 - now_s for group_id, deadline in pairs if deadline is not None}

    def _limit(self, is_excused: bool) -> int:
        return _ANY_NUMBER if is_excused else self._max_attempts

    async def commit(self, group: Group, fencing_token: int) -> CommitOutcome:
        """Store a complete, scored group and make it READY. May be repeated until it answers.

        Raises:
            InvalidArgumentError: the group breaks a rule of its type, or packs into more than ``payload_limit_bytes``.
            UnavailableError: nothing has changed; try again.
        """
        payload = encode_group(group)
        if len(payload) > self._payload_limit_bytes:
            raise InvalidArgumentError(
                f"group {group.group_id} packs into {len(payload)} bytes, replay.payload_limit_bytes is "
                f"{self._payload_limit_bytes}",
                "samples",
            )
        key = self._keys.payload(group.group_id, fencing_token)
        arguments = (group.group_id, fencing_token, key, len(group.samples), group.num_tokens, group.oldest_version)
        answer = await self._commits.submit(key, payload, tuple(map(str, arguments)))
        return CommitOutcome(answer.decode())

    async def give_back(
        self, group_id: str, fencing_token: int, reason: str, *, is_final: bool = False, is_excused: bool = False
    ) -> GroupState | None:
        """End a lease without a commit.

        Args:
            reason: one sentence, which the row keeps.
            is_final: another attempt would fail as well: the group is FAILED at once.
            is_excused: the group is not at fault: the group is PENDING again, whatever the number of its attempts.

        Returns:
            PENDING or FAILED, and the same for a repeated call; None if the lease was over before.
        """
        to = GroupState.FAILED if is_final else GroupState.PENDING
        return await self._give_back(group_id, fencing_token, to, reason, self._limit(is_excused))

    async def filter_group(self, group_id: str, fencing_token: int, reason: str) -> GroupState | None:
        """End a complete group that must not be trained. Return FILTERED, or None if the lease was over before."""
        return await self._give_back(group_id, fencing_token, GroupState.FILTERED, reason, 0)

    async def _give_back(
        self, group_id: str, fencing_token: int, to: GroupState, reason: str, max_attempts: int
    ) -> GroupState | None:
        answer = await self._run("give_back", group_id, fencing_token, to.value, reason, max_attempts)
        return None if answer is None else GroupState(answer.decode())

    async def newest_version(self) -> RecordedVersion | None:
        """Return the newest recorded version; None before the first one. No token is of a newer version."""
        with translate_errors():
            known: Any = await self._redis.hmget(self._keys.meta, ["newest_version", "newest_step"])
        version, step = known
        if version is None or step is None:
            return None
        return RecordedVersion(PolicyVersion.parse(version.decode()), int(step))

    async def snapshot(self) -> LedgerSnapshot:
        """Return the counts of this moment. O(1)."""
        with translate_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                for state in GroupState:
                    pipeline.zcard(self._keys.index(state))
                pipeline.hmget(self._keys.totals, [state.value for state in GroupState])
                pipeline.zcard(self._keys.slots)
                pipeline.hmget(self._keys.meta, ["opened", "closed"])
                *with_row, without_row, num_slots_used, (num_opened, closed) = await pipeline.execute()
        counts = [rows + int(more or 0) for rows, more in zip(with_row, without_row, strict=True)]
        num_groups = dict(zip(GroupState, counts, strict=True))
        return LedgerSnapshot(num_groups, num_slots_used, int(num_opened or 0), closed is not None)

    async def totals(self) -> LedgerTotals:
        """Return the figures that need no rows. O(kinds of reasons)."""
        with translate_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hmget(self._keys.meta, ["opened", "num_steps"])
                pipeline.hgetall(self._keys.totals)
                pipeline.hgetall(self._keys.reasons)
                (num_opened, num_steps), counts, reasons = await pipeline.execute()
        kinds = [(*field.decode().split("\0", 1), int(count)) for field, count in reasons.items()]
        return LedgerTotals(
            num_opened=int(num_opened or 0),
            num_steps=int(num_steps or 0),
            num_compacted={state: int(counts.get(state.value.encode(), 0)) for state in GroupState},
            num_retried=int(counts.get(b"retried", 0)),
            sequence_sum=int(counts.get(b"sequence_sum", 0)),
            reasons=tuple((GroupState(state), reason, count) for state, reason, count in kinds),
        )

    async def memory(self) -> RedisMemory:
        """Return the memory that the server uses, and its limit."""
        with translate_errors():
            return RedisMemory.of(await self._redis.info("memory"))

    async def row(self, group_id: str) -> GroupRow | None:
        """Return the row of a group; None if the group has no row."""
        with translate_errors():
            fields: Any = await self._redis.hgetall(self._keys.row(group_id))
        return _parse(fields) if fields else None

    async def rows(self, state: GroupState | None = None) -> AsyncIterator[GroupRow]:
        """Yield all rows in the order of the line, or the rows in ``state`` in the order of that state's index.

        The rows are read in portions, at different moments. A group that moves or ends meanwhile may be missed. Of the
        groups that ended, only the latest have a row.
        """
        index = self._keys.line if state is None else self._keys.index(state)
        start = 0
        while True:
            end = start + ROWS_PER_CALL - 1
            with translate_errors():
                ids: Any = await self._redis.zrange(index, start, end)
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for group_id in ids:
                        pipeline.hgetall(self._keys.row(group_id.decode()))
                    replies = await pipeline.execute()
            for fields in replies:
                if fields:
                    yield _parse(fields)
            if len(ids) < ROWS_PER_CALL:
                return
            start += len(ids)

    async def _run(self, name: str, *arguments: str | int) -> Any:
        with translate_errors():
            return await self._scripts[name](keys=self._keys.for_scripts, args=(self._keys.row_prefix, *arguments))


def _parse(fields: Mapping[bytes, bytes]) -> GroupRow:
    return parse_row([part for pair in fields.items() for part in pair])
