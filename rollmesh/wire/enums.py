"""Enumerations on the wire: ``StopReason.LENGTH`` is ``STOP_REASON_LENGTH``, and so on for each member.

The import builds the tables by name, so that a member without a counterpart in the protos fails at once.
"""

from __future__ import annotations

import enum
from typing import Any, Generic, TypeVar

from rollmesh.types import LearnerPhase, LeaseKind, Role, RunState, StopReason
from rollmesh.v1 import coordinator_pb2, learner_pb2, trajectory_pb2
from rollmesh.wire.checks import refuse

MemberT = TypeVar("MemberT", bound=enum.Enum)


class EnumTable(Generic[MemberT]):
    """Translates between an enumeration of `rollmesh.types` and its generated counterpart, in both directions.

    Args:
        members: the domain's enumeration.
        wire: the generated enumeration.
        prefix: what the generated names start with.
    """

    def __init__(self, members: type[MemberT], wire: Any, prefix: str) -> None:
        self._to_wire: dict[MemberT, Any] = {member: wire.Value(f"{prefix}_{member.name}") for member in members}
        self._from_wire: dict[int, MemberT] = {number: member for member, number in self._to_wire.items()}

    def to_proto(self, member: MemberT) -> Any:
        return self._to_wire[member]

    def from_proto(self, number: int, field: str) -> MemberT:
        """Return the member of a number. Raises InvalidArgumentError for UNSPECIFIED and for an unknown number."""
        member = self._from_wire.get(number)
        if member is None:
            refuse(field, f"has the unknown value {number}" if number else "is not specified")
        return member


STOP_REASONS = EnumTable(StopReason, trajectory_pb2.StopReason, "STOP_REASON")
LEASE_KINDS = EnumTable(LeaseKind, coordinator_pb2.LeaseKind, "LEASE_KIND")
ROLES = EnumTable(Role, coordinator_pb2.Role, "ROLE")
RUN_STATES = EnumTable(RunState, coordinator_pb2.RunState, "RUN_STATE")
LEARNER_PHASES = EnumTable(LearnerPhase, learner_pb2.LearnerPhase, "LEARNER_PHASE")
