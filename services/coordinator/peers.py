"""The rollout workers as the weight protocol sees them: clients that are kept, and calls to all of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from rollmesh.errors import DeadlineError, RollMeshError
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, WeightEpoch, WeightPlan
from services.coordinator.members import Member

T = TypeVar("T")
GRACE_S = 1.0


class RolloutPeer(Protocol):
    """The engine's half of the weight protocol, as `rollmesh.rpc.rollout_client.RolloutClient` speaks it."""

    async def prepare(
        self,
        version: PolicyVersion,
        plan: WeightPlan,
        epoch: WeightEpoch,
        rank: int,
        transfer_deadline_s: float,
        *,
        timeout_s: float,
    ) -> None: ...

    async def receive(self, version: PolicyVersion, *, timeout_s: float) -> ReceiveReport: ...

    async def commit(self, version: PolicyVersion, *, timeout_s: float) -> CommitReport: ...

    async def abort(self, version: PolicyVersion, reason: str, *, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class Peers:
    """One client per worker, kept as long as its incarnation lives.

    Args:
        connect: makes the client of an address.
    """

    def __init__(self, connect: Callable[[str], RolloutPeer]) -> None:
        self._connect = connect
        self._by_name: dict[str, tuple[str, RolloutPeer]] = {}

    async def of(self, member: Member) -> RolloutPeer:
        known = self._by_name.get(member.name)
        if known is not None and known[0] == member.incarnation:
            return known[1]
        if known is not None:
            await known[1].close()
        peer = self._connect(member.address)
        self._by_name[member.name] = (member.incarnation, peer)
        return peer

    async def close(self) -> None:
        while self._by_name:
            _, (_, peer) = self._by_name.popitem()
            await peer.close()


async def call_all(
    calls: dict[str, Coroutine[Any, Any, T]], timeout_s: float, pending: set[str]
) -> dict[str, T | RollMeshError]:
    """Await all calls, by the name of their worker; ``pending`` holds those that have not answered yet.

    A call keeps its own deadline of ``timeout_s``, and the one here is for a client that overlooks it. Only errors of
    the mesh are answers; anything else is a fault of ours and is raised.
    """
    pending.clear()
    pending.update(calls)

    async def bounded(name: str, call: Coroutine[Any, Any, T]) -> tuple[str, T | RollMeshError]:
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                return name, await call
        except TimeoutError:
            return name, DeadlineError(f"no answer within {timeout_s:g} s")
        except RollMeshError as error:
            return name, error
        finally:
            pending.discard(name)

    return dict(await asyncio.gather(*(bounded(name, call) for name, call in calls.items())))
