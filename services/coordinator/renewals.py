"""The leases that heartbeats renew.

::

    heartbeat ──ask──► evaluation: renewed at once
                └────► training: waits ──flush, once a second──► ledger ──over──► told at the member's next heartbeat

A worker renews what it goes on with, so that a lease ends when its holder is gone, stuck or superseded, and never
because the work is long. The ledger decides: a lease whose time was up before it was renewed stays over.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollmesh.replay.ledger import Ledger
from rollmesh.types import LeaseKey, LeaseKind
from services.coordinator.evaluation import Evaluator
from services.coordinator.members import Member


class Renewals:
    """Collects what members ask for, so that Redis is asked once a second whatever their number.

    Args:
        ledger: of the run.
        evaluator: None where the run has no evaluation.
        lease_ttl_s: life of a lease from its last renewal.
    """

    def __init__(self, ledger: Ledger, evaluator: Evaluator | None, lease_ttl_s: float) -> None:
        self._ledger = ledger
        self._evaluator = evaluator
        self._lease_ttl_s = lease_ttl_s
        self._waiting: dict[LeaseKey, Member] = {}

    def ask(self, member: Member, keys: Sequence[LeaseKey]) -> None:
        """The member goes on with these leases."""
        for key in keys:
            if key.kind is LeaseKind.TRAIN:
                self._waiting[key] = member
            elif self._evaluator is None or not self._evaluator.renew(key.group_id, key.fencing_token):
                member.ended_leases.append(key)

    async def flush(self) -> None:
        """Renew in the ledger what has been asked for. What could not be renewed is tried again by the next call.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        asked = dict(self._waiting)
        if not asked:
            return
        ended = await self._ledger.renew([(key.group_id, key.fencing_token) for key in asked], self._lease_ttl_s)
        for key, member in asked.items():
            self._waiting.pop(key, None)
            if key.group_id in ended:
                member.ended_leases.append(key)
