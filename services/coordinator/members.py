"""The members of the run: registrations, heartbeats, and the version that each rollout worker serves.

This module keeps all in memory and does no I/O; the caller gives a clock. Each start of a process is an *incarnation*.
A new incarnation takes over the name, and the replaced incarnation may not come back: otherwise two processes with one
name would replace each other for ever. An incarnation that was dropped for silence may register again, and still serves
its version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from rollmesh.errors import InvalidArgumentError, SupersededError, UnknownMemberError
from rollmesh.types import LeaseKey, MemberReport, PolicyVersion, Role
from rollmesh.wire.limits import MAX_MEMBERS

Clock = Callable[[], float]

MAX_DEPARTED = 4096
"""Incarnations that are remembered after they left. A forgotten incarnation that comes back is a new member: it serves
no version until the next publish, and its tokens count anew. A member says little of itself, so that all of them take
a few megabytes."""

MAX_TRIES = 5
"""Publishes of the committed version that are made for one member that lacks the version."""

MAX_BEATS_PER_S = 200
"""Heartbeats that all members together send per second, as long as each member sends often enough."""
BEATS_PER_TIMEOUT = 6
"""Heartbeats of a member within the silence that has consequences. A few of them may be lost."""


def heartbeat_interval_s(num_members: int, wanted_s: float, timeout_s: float) -> float:
    """Return the seconds between two heartbeats of a member.

    Many members send less often, so that the coordinator's work stays bounded. With ``wanted_s`` 1 and ``timeout_s``
    30, each of up to 200 members sends a heartbeat every second, and each of 1,000 members every 5 s.

    Args:
        num_members: members of the run.
        wanted_s: interval for few members.
        timeout_s: seconds of silence that have consequences.
    """
    return max(wanted_s, min(num_members / MAX_BEATS_PER_S, timeout_s / BEATS_PER_TIMEOUT))


@dataclass
class Member:
    """One incarnation of one service.

    Attributes:
        num_weight_ranks: processes of the member that take part in weight transfers.
        last_seen_s: clock time of the member's last heartbeat.
        version: the version that the member serves; None before its first commit.
        missed_prepare_s: clock time when the member last failed to answer PREPARE, or None. The member gets the next
            PREPARE only after another heartbeat, so that a frozen worker costs one deadline and not one per version.
        num_tries: publishes of the committed version that were made for the member, since the member last served one.
        num_generated_tokens: tokens that the member generated, as last reported.
        report: what the last heartbeat reported.
        is_banned: whether this incarnation may never come back.
        ended_leases: leases that the member asked to renew and that are over. The answer to the next heartbeat names
            them.
    """

    name: str
    role: Role
    incarnation: str
    address: str
    num_weight_ranks: int
    last_seen_s: float
    version: PolicyVersion | None = None
    missed_prepare_s: float | None = None
    num_tries: int = 0
    num_generated_tokens: int = 0
    report: MemberReport = field(default_factory=MemberReport)
    is_banned: bool = False
    ended_leases: list[LeaseKey] = field(default_factory=list)

    @property
    def may_be_tried(self) -> bool:
        """Whether the committed version may be published again for the member.

        A member that cannot be brought to the version gets it with the next version, if at all. Without this bound, the
        tries would pass for progress of a run in which nothing else moves.
        """
        return self.can_prepare and self.num_tries < MAX_TRIES

    @property
    def can_prepare(self) -> bool:
        """Whether the member takes part in the next publish."""
        if self.role is not Role.ROLLOUT or self.num_weight_ranks == 0:
            return False
        return self.missed_prepare_s is None or self.last_seen_s > self.missed_prepare_s


class Members:
    """The table of members, by name.

    Args:
        timeout_s: seconds of silence after which a member is dropped.
        clock: seconds, without the time that the coordinator slept through.
    """

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._started_s = clock()
        self._by_name: dict[str, Member] = {}
        self._departed: dict[tuple[str, str], Member] = {}
        self._num_forgotten_tokens = 0
        self.changed = asyncio.Event()
        """Set whenever a member registers, sends a heartbeat or goes. Clear the event before waiting on it."""

    def __len__(self) -> int:
        return len(self._by_name)

    def register(
        self,
        name: str,
        role: Role,
        incarnation: str,
        address: str,
        num_weight_ranks: int,
        serving: PolicyVersion | None = None,
    ) -> tuple[Member, Member | None]:
        """Add a member. Return the member, and the incarnation that it replaced or None. Repeating is harmless.

        ``serving`` counts for a member that this coordinator does not know. For a member that was dropped for silence,
        the coordinator's own record counts: the member may have lost a load that it has not noticed yet.

        Raises:
            InvalidArgumentError: a name or incarnation is missing, the run has a learner already, or the run has as
                many members as a run may have.
            SupersededError: a newer incarnation has taken over the name, or this incarnation is banned.
        """
        if not name or not incarnation:
            raise InvalidArgumentError(
                "a member needs a name and an incarnation", "name" if not name else "incarnation"
            )
        departed = self._departed.get((name, incarnation))
        if departed is not None and departed.is_banned:
            raise SupersededError(
                f"this process may not come back as {name!r}: another process registered under that name, or this "
                "process was dropped for a failed load; start the process anew, and give each member its own name"
            )
        if role is Role.LEARNER and (other := self.learner) is not None and other.name != name:
            raise InvalidArgumentError(f"the run has a learner, {other.name!r}; a second learner cannot join", "role")
        former = self._by_name.get(name)
        if former is None and len(self) >= MAX_MEMBERS:
            raise InvalidArgumentError(f"the run has {len(self)} members, and no run may have more", "name")
        if former is not None and former.incarnation == incarnation:
            former.last_seen_s = self._clock()
            return former, None
        if former is not None:
            self.remove(name, former.incarnation, is_banned=True)
        # A member that comes back keeps its object: a publish that was under way when it went may still write to it.
        self._departed.pop((name, incarnation), None)
        member = departed or Member(name, role, incarnation, address, num_weight_ranks, self._clock(), serving)
        member.last_seen_s = self._clock()
        self._by_name[name] = member
        self.changed.set()
        return member, former

    def require(self, name: str, incarnation: str) -> Member:
        """Return a member.

        Raises:
            UnknownMemberError: this incarnation is not a member.
        """
        member = self._by_name.get(name)
        if member is None or member.incarnation != incarnation:
            raise UnknownMemberError(f"{name!r} is not a member in this incarnation; register again")
        return member

    def heartbeat(self, name: str, incarnation: str, report: MemberReport) -> Member:
        """Record a heartbeat, and return the member.

        Raises:
            UnknownMemberError: this incarnation is not a member.
        """
        member = self.require(name, incarnation)
        member.last_seen_s = self._clock()
        member.report = report
        member.num_generated_tokens = max(member.num_generated_tokens, report.num_generated_tokens)
        self.changed.set()
        return member

    def remove(self, name: str, incarnation: str, is_banned: bool = False) -> Member | None:
        """Remove a member and return it; return None if this incarnation is not a member.

        A banned incarnation may not come back. The last `MAX_DEPARTED` removed incarnations are remembered.
        """
        member = self._by_name.get(name)
        if member is None or member.incarnation != incarnation:
            return None
        del self._by_name[name]
        member.is_banned = is_banned
        self._departed[name, incarnation] = member
        if len(self._departed) > MAX_DEPARTED:
            oldest = self._departed.pop(next(iter(self._departed)))
            self._num_forgotten_tokens += oldest.num_generated_tokens
        self.changed.set()
        return member

    def silent(self) -> list[Member]:
        """Return the members that were silent for longer than ``timeout_s``. The caller removes them."""
        oldest = self._clock() - self._timeout_s
        return [member for member in self._by_name.values() if member.last_seen_s < oldest]

    def give_time(self) -> None:
        """Start the timeout of every member anew, after a time in which the coordinator could hear no member."""
        for member in self._by_name.values():
            member.last_seen_s = self._clock()

    @property
    def age_s(self) -> float:
        """Seconds for which members have been able to register with this coordinator."""
        return self._clock() - self._started_s

    def get(self, name: str) -> Member | None:
        """Return the member of this name; None if there is none."""
        return self._by_name.get(name)

    def heartbeat_age_s(self, member: Member) -> float:
        """Return the seconds since the member's last heartbeat."""
        return max(0.0, self._clock() - member.last_seen_s)

    @property
    def all(self) -> list[Member]:
        """All members, sorted by role, then by name."""
        order = list(Role)
        return sorted(self._by_name.values(), key=lambda member: (order.index(member.role), member.name))

    @property
    def rollouts(self) -> list[Member]:
        """The rollout workers, sorted by name."""
        return [member for member in self.all if member.role is Role.ROLLOUT]

    @property
    def learner(self) -> Member | None:
        """The learner; None if no learner is a member."""
        return next((member for member in self._by_name.values() if member.role is Role.LEARNER), None)

    @property
    def num_moves(self) -> tuple[int, ...]:
        """For each member, a counter that grows while the member's work moves."""
        return tuple(member.report.num_moves for member in self._by_name.values())

    @property
    def patience_s(self) -> float:
        """The longest time in seconds for which a member says that its work may stand still."""
        return max((member.report.patience_s for member in self._by_name.values()), default=0.0)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that all incarnations of the run have reported."""
        members = (*self._departed.values(), *self._by_name.values())
        return self._num_forgotten_tokens + sum(member.num_generated_tokens for member in members)
