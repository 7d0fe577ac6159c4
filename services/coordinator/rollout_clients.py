"""The coordinator's clients of the rollout workers, and calls that outlive a lost connection.

A rollout worker gives a repeated call the answer of the first call. Therefore a call whose connection breaks is
repeated until its deadline, or until its worker is no member any more. Every other error is the worker's own answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from rollmesh.errors import DeadlineError, RollMeshError, UnavailableError
from rollmesh.rpc.retry import retry
from rollmesh.rpc.rollout_client import RolloutClient
from rollmesh.types import Announcement, CommitReport, PolicyVersion, ReceiveReport, WeightEpoch
from rollmesh.wire.weights import EncodedPlan
from services.coordinator.members import Member

T = TypeVar("T")
GRACE_S = 1.0
"""Seconds after its deadline at which a call is ended that has not ended by itself."""
PREPARE_PATIENCE_S = 3.0
"""Seconds for which PREPARE is repeated to a worker without a connection. A short break of the connection is over by
then, and a dead worker does not hold the other workers up for longer."""


@dataclass(frozen=True)
class Party:
    """One worker in one publish. Each call raises UnavailableError or DeadlineError if the worker gave no answer.

    Attributes:
        member: the worker.
        client: calls the worker.
        rank: rank of the worker's first process in the weight epoch.
        is_member: whether the worker still belongs to the run.
    """

    member: Member
    client: RolloutClient
    rank: int
    is_member: Callable[[], bool]

    async def prepare(self, announced: Announcement, plan: EncodedPlan, epoch: WeightEpoch, timeout_s: float) -> None:
        """Ask the worker to get ready for a version. Repeated for `PREPARE_PATIENCE_S` over broken connections."""

        def call(left_s: float) -> Awaitable[None]:
            deadline_s = announced.transfer_deadline_s
            return self.client.prepare(announced.version, plan, epoch, self.rank, deadline_s, timeout_s=left_s)

        await self._ask(call, timeout_s, PREPARE_PATIENCE_S)

    async def receive(self, version: PolicyVersion, timeout_s: float) -> ReceiveReport:
        """Ask the worker to receive the weights, and return what the worker received."""
        return await self._ask(lambda left_s: self.client.receive(version, timeout_s=left_s), timeout_s, timeout_s)

    async def commit(self, version: PolicyVersion, timeout_s: float) -> CommitReport:
        """Ask the worker to load and serve the version."""
        return await self._ask(lambda left_s: self.client.commit(version, timeout_s=left_s), timeout_s, timeout_s)

    async def abort(self, version: PolicyVersion, reason: str, timeout_s: float) -> None:
        """Ask the worker to drop the version. A lost call is not repeated: the next PREPARE drops the version too."""
        await self._ask(lambda left_s: self.client.abort(version, reason, timeout_s=left_s), timeout_s, patience_s=0.0)

    async def _ask(self, call: Callable[[float], Awaitable[T]], timeout_s: float, patience_s: float) -> T:
        """Make a call, repeat it over broken connections for up to ``patience_s`` seconds, and return the answer."""
        clock = asyncio.get_running_loop().time
        end = clock() + patience_s

        def should_retry(error: UnavailableError | DeadlineError) -> bool:
            return isinstance(error, UnavailableError) and self.is_member() and clock() < end

        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                return await retry(call, timeout_s=timeout_s, should_retry=should_retry)
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s:g} s") from error


class RolloutClients:
    """One client per worker, which lives as long as the worker's incarnation.

    Args:
        connect: returns a client for an address.
    """

    def __init__(self, connect: Callable[[str], RolloutClient]) -> None:
        self._connect = connect
        self._by_name: dict[str, tuple[str, RolloutClient]] = {}

    async def of(self, member: Member) -> RolloutClient:
        """Return the client of a worker. A new incarnation gets a new client."""
        known = self._by_name.get(member.name)
        if known is not None and known[0] == member.incarnation:
            return known[1]
        if known is not None:
            await known[1].close()
        client = self._connect(member.address)
        self._by_name[member.name] = (member.incarnation, client)
        return client

    async def close(self) -> None:
        """Close all clients."""
        while self._by_name:
            _, (_, client) = self._by_name.popitem()
            await client.close()


async def call_all(calls: dict[str, Coroutine[Any, Any, T]], pending: set[str]) -> dict[str, T | RollMeshError]:
    """Make all calls at once.

    Args:
        calls: the calls by name of the worker. Each call ends by its own deadline.
        pending: while the calls run, holds the names of the workers that have not answered yet.

    Returns:
        The answers by name of the worker. A `RollMeshError` is an answer; any other error is a bug and is raised.
    """
    pending.clear()
    pending.update(calls)

    async def answer(name: str, call: Coroutine[Any, Any, T]) -> tuple[str, T | RollMeshError]:
        try:
            return name, await call
        except RollMeshError as error:
            return name, error
        finally:
            pending.discard(name)

    return dict(await asyncio.gather(*(answer(name, call) for name, call in calls.items())))
