"""The ledger as the coordinator uses it: the transitions that only the run's current coordinator may make.

::

    open_groups ──► PENDING ──lease──► LEASED ──renew──► LEASED
                       ▲                 │
                       └─ expire, revoke ┴──► FAILED          record_version, release_slots, close

Every coordinator that takes the run gets a new term (see `claim`), and every call here names the term of its
coordinator. Once another coordinator has taken over, Redis refuses the call and nothing changes. So a coordinator that
was believed dead, and wakes up, changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from rollmesh.errors import ReplayError, RunEndedError, SupersededError, UnavailableError
from rollmesh.replay.connection import translate_errors
from rollmesh.replay.ledger import ROWS_PER_CALL, Ledger
from rollmesh.replay.rows import GroupRow, parse_row
from rollmesh.replay.scripts import source
from rollmesh.types import PolicyVersion, PromptId

LEASE_EXPIRED = "lease expired"
MEMBER_LOST = "member lost"
SCRIPTS = ("open", "lease", "renew", "expire", "give_back", "close", "version", "release")
"""The scripts that a coordinator calls, all of them behind the fence."""


class CoordinatorLedger(Ledger):
    """The ledger of one run, for the coordinator with one term.

    Every method that changes the ledger may also raise SupersededError: another coordinator of the run has taken over,
    and nothing has changed.

    Args:
        redis: from `connection.connect`; the caller closes the client.
        run_id: names the run's keys.
        payload_limit_bytes: see `Ledger`.
        max_attempts: leases of one group before it is FAILED.
        term: from `RunClaim.take`; 0 where no coordinator has claimed the run.
    """

    def __init__(
        self,
        redis: Redis,
        run_id: str,
        payload_limit_bytes: int = 512 * 1024 * 1024,
        max_attempts: int = 3,
        *,
        term: int,
    ) -> None:
        super().__init__(redis, run_id, payload_limit_bytes, max_attempts)
        self._term = term
        self._scripts = {name: redis.register_script(source(f"fence/{name}")) for name in SCRIPTS}

    async def open_groups(
        self, prompt_ids: Sequence[PromptId], num_slots: int | None = None, first_place: int | None = None
    ) -> list[GroupRow]:
        """Open a group for each prompt: the group gets a slot and the next place in the line. Existing groups stay.

        Args:
            num_slots: open no group once this many slots are taken; None opens a group for each prompt.
            first_place: place of the first prompt in the line. A prompt whose place is taken is left out. Therefore a
                repeated call opens no group twice, even if the groups have ended meanwhile.

        Returns:
            The rows of the prompts that have a row after the call, in the order of ``prompt_ids``.

        Raises:
            RunEndedError: a prompt has no group yet, and the ledger is closed.
        """
        try:
            rows = await self._rows("open", _or_any(num_slots), _or_any(first_place), *map(str, prompt_ids))
        except ReplayError as error:
            if "the ledger is closed" in str(error):
                raise RunEndedError("the ledger is closed: no group can be opened any more") from error
            raise
        return rows

    async def close(self) -> None:
        """Say that no group will be opened any more, so that the learner takes what is left as its last batch."""
        await self._run("close")

    async def lease(self, member: str, ttl_s: float, limit: int, num_slots: int | None = None) -> list[GroupRow]:
        """Lease up to ``limit`` pending groups to ``member``, the first in the line first, for ``ttl_s`` seconds.

        Args:
            num_slots: A, the number of slots. A group stays PENDING while ``num_slots`` groups that hold a slot stand
                before it in the line. This can only happen after a learner went back to a checkpoint. None leases any
                pending group.
        """
        if limit < 1:
            return []
        return await self._rows("lease", member, _as_ms(ttl_s), limit, secrets.token_hex(8), _or_any(num_slots))

    async def renew(self, leases: Sequence[tuple[str, int]], ttl_s: float) -> set[str]:
        """Let leases live for ``ttl_s`` seconds from now. May be repeated.

        Args:
            leases: group id and fencing token of each.

        Returns:
            The ids of the groups whose lease is over: the lease expired, ended, or was superseded. These groups have
            not changed.
        """
        ended: set[str] = set()
        for start in range(0, len(leases), ROWS_PER_CALL):
            pairs = (part for lease in leases[start : start + ROWS_PER_CALL] for part in lease)
            ended.update(group_id.decode() for group_id in await self._run("renew", _as_ms(ttl_s), *pairs))
        return ended

    async def expire_leases(self, *, is_excused: bool = False) -> list[GroupRow]:
        """End all leases whose time is up by the clock of the Redis server.

        Args:
            is_excused: the groups are not at fault, and none of them becomes FAILED.

        Returns:
            The rows of the groups: PENDING at the old place in the line, or FAILED after the last attempt.
        """
        return await self._end_leases("", LEASE_EXPIRED, self._limit(is_excused))

    async def revoke_member(self, member: str, *, is_excused: bool = False) -> list[GroupRow]:
        """End all leases of a member that is gone. Takes ``is_excused`` and returns rows like `expire_leases`."""
        return await self._end_leases(member, MEMBER_LOST, self._limit(is_excused))

    async def _end_leases(self, member: str, reason: str, max_attempts: int) -> list[GroupRow]:
        rows: list[GroupRow] = []
        while True:
            ended = await self._rows("expire", member, reason, max_attempts, ROWS_PER_CALL)
            rows.extend(ended)
            if len(ended) < ROWS_PER_CALL:
                return rows

    async def record_version(self, version: PolicyVersion, step: int) -> None:
        """Record a version before the first engine serves it. May be repeated. An older version changes nothing.

        Args:
            step: the step that made the version; 0 for the version of the initial model.
        """
        await self._run("version", str(version), version.number, step)

    async def release_slots(self, through_step: int) -> int:
        """Free the slots of the groups that the steps up to ``through_step`` trained: their version is committed now.

        Returns:
            The number of slots that this call freed.
        """
        return int(await self._run("release", through_step))

    async def holders(self) -> frozenset[str]:
        """Return the names of the members that hold leases, overdue leases included. O(leases).

        For a coordinator that starts anew: a member that does not come back holds its leases until they expire.
        """
        with translate_errors():
            entries: Any = await self._redis.zrange(self._keys.holders, 0, -1)
        return frozenset(entry.decode().split("\0", 1)[0] for entry in entries)

    async def _run(self, name: str, *arguments: str | int) -> Any:
        try:
            return await super()._run(name, *arguments, self._term)
        except ReplayError as error:
            if "SUPERSEDED " in str(error):
                raise SupersededError(str(error).partition("SUPERSEDED ")[2].partition(" script:")[0]) from error
            if "LOST " in str(error):  # The claim finds this as well, and says why the run cannot go on.
                raise UnavailableError("Redis has lost the keys of this run") from error
            raise

    async def _rows(self, name: str, *arguments: str | int) -> list[GroupRow]:
        return [parse_row(reply) for reply in await self._run(name, *arguments)]


def _or_any(number: int | None) -> int:
    """Return the number, or -1 for None: scripts read -1 as "any number"."""
    return -1 if number is None else number


def _as_ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
