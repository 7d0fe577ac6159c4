"""The renewal of leases by heartbeats.

::

    heartbeat ──ask──► evaluation: renewed at once
                └────► training: waits ──flush, once a second──► ledger ──over──► told at the member's next heartbeat

A worker renews the leases of the groups on which the worker makes progress. Therefore a lease ends when its holder is
gone, stuck or superseded, and never because the work is long. The ledger decides: a lease whose time was up before the
renewal stays over.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.types import LeaseKey, LeaseKind
from services.coordinator.evaluation import Evaluator
from services.coordinator.members import Member


class Renewals:
    """Collects the renewals of all members, so that Redis gets one request a second whatever the number of members.

    Args:
        ledger: the run's ledger.
        evaluator: None where the run has no evaluation.
        lease_ttl_s: seconds that a lease lives from its last renewal.
    """

    def __init__(self, ledger: CoordinatorLedger, evaluator: Evaluator | None, lease_ttl_s: float) -> None:
        self._ledger = ledger
        self._evaluator = evaluator
        self._lease_ttl_s = lease_ttl_s
        self._waiting: dict[LeaseKey, Member] = {}

    def ask(self, member: Member, keys: Sequence[LeaseKey]) -> None:
        """Renew leases of a member: evaluation leases at once, training leases at the next `flush`."""
        for key in keys:
            if key.kind is LeaseKind.TRAIN:
                self._waiting[key] = member
            elif self._evaluator is None or not self._evaluator.renew(key.group_id, key.fencing_token):
                member.ended_leases.append(key)

    async def flush(self) -> None:
        """Renew the collected training leases in the ledger. If this fails, the next call tries again.

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
