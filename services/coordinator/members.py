"""Who is in the run: registrations, heartbeats, and the version that each rollout worker serves.

In memory and without I/O; time is a function that the caller gives. A start of a process is an *incarnation*: a new one
takes over its name, and the one it replaced may not come back (two processes with one name would otherwise replace
each other for ever). An incarnation that was dropped for silence may register again, and still serves what it served.
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
"""Incarnations that are remembered after they went. One that is forgotten and comes back all the same is a new member:
it serves no version until the next publish, and its tokens count anew. What it says of itself is small, so that this
many take a few megabytes."""


MAX_BEATS_PER_S = 200
"""Heartbeats that all members together send, where that keeps each of them often enough."""
BEATS_PER_TIMEOUT = 6
"""Heartbeats that fit into the time after which silence has consequences, so that some may be lost."""


def heartbeat_interval_s(num_members: int, wanted_s: float, timeout_s: float) -> float:
    """How often a member sends a heartbeat: with many members less often, so that the coordinator's work does not grow
    with them. Of 1,000 members that may be silent for 30 s each sends one in 5 s; up to 200 send one each second.

    Args:
        wanted_s: the interval of few members.
        timeout_s: silence that has consequences.
    """
    return max(wanted_s, min(num_members / MAX_BEATS_PER_S, timeout_s / BEATS_PER_TIMEOUT))


@dataclass
class Member:
    """One incarnation of one service.

    Attributes:
        num_weight_ranks: its processes that take part in weight transfers.
        last_seen_s: clock time of its last heartbeat.
        version: what it serves; None until its first commit.
        missed_prepare_s: clock time when it last failed to answer PREPARE, or None. It is asked again only once it has
            sent a heartbeat since, so that a frozen worker costs the learner one deadline and not one per version.
        num_generated_tokens: as it last reported.
        report: of its last heartbeat.
        is_banned: it went, and may not come back.
        ended_leases: leases that it asked to renew and that are over; its next heartbeat tells it.
    """

    name: str
    role: Role
    incarnation: str
    address: str
    num_weight_ranks: int
    last_seen_s: float
    version: PolicyVersion | None = None
    missed_prepare_s: float | None = None
    num_generated_tokens: int = 0
    report: MemberReport = field(default_factory=MemberReport)
    is_banned: bool = False
    ended_leases: list[LeaseKey] = field(default_factory=list)

    @property
    def can_prepare(self) -> bool:
        if self.role is not Role.ROLLOUT or self.num_weight_ranks == 0:
            return False
        return self.missed_prepare_s is None or self.last_seen_s > self.missed_prepare_s


class Members:
    """The table of members, by name.

    Args:
        timeout_s: silence after which a member is dropped.
        clock: seconds, without those that the coordinator slept through.
    """

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._by_name: dict[str, Member] = {}
        self._departed: dict[tuple[str, str], Member] = {}
        self._num_forgotten_tokens = 0
        self.changed = asyncio.Event()
        """Set whenever somebody registers, beats or goes; whoever waits on it clears it."""

    def __len__(self) -> int:
        return len(self._by_name)

    def register(
        self, name: str, role: Role, incarnation: str, address: str, num_weight_ranks: int
    ) -> tuple[Member, Member | None]:
        """Add a member. Returns it and the incarnation that it replaced, if any; repeating is harmless.

        Raises:
            InvalidArgumentError: a name or incarnation is missing, the role has its one member already, or there are
                more members than a run may have.
            SupersededError: a newer incarnation has taken over the name, or this one was banned.
        """
        if not name or not incarnation:
            raise InvalidArgumentError(
                "a member needs a name and an incarnation", "name" if not name else "incarnation"
            )
        departed = self._departed.get((name, incarnation))
        if departed is not None and departed.is_banned:
            raise SupersededError(
                f"this process may not come back as {name!r}: another one registered under that name, or it was "
                "dropped for a failed load; start it anew, and give each member its own name"
            )
        if role is Role.LEARNER and (other := self.learner) is not None and other.name != name:
            raise InvalidArgumentError(f"the run has a learner, {other.name!r}; a second one cannot join", "role")
        former = self._by_name.get(name)
        if former is None and len(self) >= MAX_MEMBERS:
            raise InvalidArgumentError(f"the run has {len(self)} members, and no run may have more", "name")
        if former is not None and former.incarnation == incarnation:
            former.last_seen_s = self._clock()
            return former, None
        if former is not None:
            self.remove(name, former.incarnation, is_banned=True)
        # The same object, where it comes back: a publish that was under way when it went may still write to it.
        self._departed.pop((name, incarnation), None)
        member = departed or Member(name, role, incarnation, address, num_weight_ranks, self._clock())
        member.last_seen_s = self._clock()
        self._by_name[name] = member
        self.changed.set()
        return member, former

    def require(self, name: str, incarnation: str) -> Member:
        """Raises UnknownMemberError if this incarnation is not a member."""
        member = self._by_name.get(name)
        if member is None or member.incarnation != incarnation:
            raise UnknownMemberError(f"{name!r} is not a member in this incarnation; register again")
        return member

    def heartbeat(self, name: str, incarnation: str, report: MemberReport) -> Member:
        """Raises UnknownMemberError if this incarnation is not a member."""
        member = self.require(name, incarnation)
        member.last_seen_s = self._clock()
        member.report = report
        member.num_generated_tokens = max(member.num_generated_tokens, report.num_generated_tokens)
        self.changed.set()
        return member

    def remove(self, name: str, incarnation: str, is_banned: bool = False) -> Member | None:
        """Takes the member out, for ever if it is banned; None if it is not one. At most `MAX_DEPARTED` are remembered,
        the latest ones."""
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
        """Members that missed their time; the caller removes them."""
        oldest = self._clock() - self._timeout_s
        return [member for member in self._by_name.values() if member.last_seen_s < oldest]

    def give_time(self) -> None:
        """Whoever is silent from now on has its whole timeout: the coordinator has heard nothing for a while."""
        for member in self._by_name.values():
            member.last_seen_s = self._clock()

    def get(self, name: str) -> Member | None:
        return self._by_name.get(name)

    def heartbeat_age_s(self, member: Member) -> float:
        return max(0.0, self._clock() - member.last_seen_s)

    @property
    def all(self) -> list[Member]:
        """By role, then name."""
        order = list(Role)
        return sorted(self._by_name.values(), key=lambda member: (order.index(member.role), member.name))

    @property
    def rollouts(self) -> list[Member]:
        """By name."""
        return [member for member in self.all if member.role is Role.ROLLOUT]

    @property
    def learner(self) -> Member | None:
        return next((member for member in self._by_name.values() if member.role is Role.LEARNER), None)

    @property
    def num_moves(self) -> tuple[int, ...]:
        """How far the work of each member has moved."""
        return tuple(member.report.num_moves for member in self._by_name.values())

    @property
    def patience_s(self) -> float:
        """The longest time for which a member's work may rightly stand still."""
        return max((member.report.patience_s for member in self._by_name.values()), default=0.0)

    @property
    def num_generated_tokens(self) -> int:
        """Of all incarnations of the run, as far as they reported."""
        members = (*self._departed.values(), *self._by_name.values())
        return self._num_forgotten_tokens + sum(member.num_generated_tokens for member in members)
