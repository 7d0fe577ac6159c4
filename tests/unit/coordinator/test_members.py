"""The table of members on virtual time."""

from __future__ import annotations

import pytest

from rollmesh.errors import InvalidArgumentError, SupersededError, UnknownMemberError
from rollmesh.types import MemberReport, PolicyVersion, Role
from services.coordinator.members import MAX_DEPARTED, Member, Members, heartbeat_interval_s


class Rig:
    def __init__(self) -> None:
        self.now = 0.0
        self.members = Members(timeout_s=10.0, clock=lambda: self.now)

    def join(self, incarnation: str, name: str = "rollout-0") -> tuple[Member, Member | None]:
        return self.members.register(name, Role.ROLLOUT, incarnation, "127.0.0.1:1", 1)


def test_repeating_a_registration_changes_nothing() -> None:
    rig = Rig()
    member, _ = rig.join("a")
    member.version = PolicyVersion(0, 3)
    again, replaced = rig.join("a")
    assert again is member
    assert replaced is None


def test_two_processes_with_one_name_do_not_replace_each_other_for_ever() -> None:
    rig = Rig()
    first, _ = rig.join("a")
    _, replaced = rig.join("b")
    assert replaced is first
    with pytest.raises(SupersededError, match="give each member its own name"):
        rig.join("a")
    with pytest.raises(UnknownMemberError):
        rig.members.heartbeat("rollout-0", "a", MemberReport())


def test_a_member_is_silent_after_its_timeout_and_not_before() -> None:
    rig = Rig()
    rig.join("a")
    other, _ = rig.join("b", "rollout-1")
    rig.now = 10.0
    assert rig.members.silent() == []
    rig.members.heartbeat("rollout-0", "a", MemberReport())
    rig.now = 10.5
    assert rig.members.silent() == [other]


def test_a_dropped_incarnation_comes_back_with_its_version_and_its_tokens_count_once() -> None:
    rig = Rig()
    member, _ = rig.join("a")
    member.version = PolicyVersion(0, 2)
    rig.members.heartbeat("rollout-0", "a", MemberReport(num_generated_tokens=500))
    rig.members.remove("rollout-0", "a")
    assert rig.members.num_generated_tokens == 500
    back, _ = rig.join("a")
    rig.members.heartbeat("rollout-0", "a", MemberReport(num_generated_tokens=600))
    assert back.version == PolicyVersion(0, 2)
    assert rig.members.num_generated_tokens == 600
    rig.join("b")
    rig.members.heartbeat("rollout-0", "b", MemberReport(num_generated_tokens=10))
    assert rig.members.num_generated_tokens == 610


def test_a_version_that_is_committed_while_its_worker_was_dropped_is_known_when_it_is_back() -> None:
    rig = Rig()
    prepared, _ = rig.join("a")
    rig.members.remove("rollout-0", "a")
    back, _ = rig.join("a")
    prepared.version = PolicyVersion(0, 3)  # the publish knows it from before
    assert back.version == PolicyVersion(0, 3)
    assert rig.members.get("rollout-0") is back


def test_a_banned_incarnation_does_not_come_back() -> None:
    rig = Rig()
    rig.join("a")
    rig.members.remove("rollout-0", "a", is_banned=True)
    with pytest.raises(SupersededError):
        rig.join("a")
    rig.join("b")


def test_a_worker_that_missed_prepare_is_asked_again_after_its_next_heartbeat() -> None:
    rig = Rig()
    member, _ = rig.join("a")
    rig.now = 1.0
    member.missed_prepare_s = 1.0
    assert not member.can_prepare
    rig.now = 2.0
    rig.members.heartbeat("rollout-0", "a", MemberReport())
    assert member.can_prepare


def test_what_is_remembered_of_members_that_went_is_bounded_and_their_tokens_stay_counted() -> None:
    rig = Rig()
    for number in range(MAX_DEPARTED + 100):
        rig.join(f"start {number}")
        rig.members.heartbeat("rollout-0", f"start {number}", MemberReport(num_generated_tokens=2))
    assert len(rig.members._departed) == MAX_DEPARTED
    assert rig.members.num_generated_tokens == 2 * (MAX_DEPARTED + 100)
    with pytest.raises(SupersededError):
        rig.join(f"start {MAX_DEPARTED}")
    back, replaced = rig.join("start 0")
    assert back.version is None, "it was forgotten, and is a new member"
    assert replaced is not None


def test_a_run_has_no_more_members_than_the_wire_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.members.MAX_MEMBERS", 2)
    rig = Rig()
    rig.join("a", "rollout-0")
    rig.join("a", "rollout-1")
    rig.join("b", "rollout-1")
    with pytest.raises(InvalidArgumentError, match="the run has 2 members"):
        rig.join("a", "rollout-2")


@pytest.mark.parametrize(
    ("num_members", "timeout_s", "interval_s"),
    [(3, 30.0, 1.0), (200, 30.0, 1.0), (400, 30.0, 2.0), (1000, 30.0, 5.0), (10_000, 30.0, 5.0), (1000, 2.0, 1.0)],
)
def test_many_members_send_heartbeats_less_often_and_never_too_rarely(
    num_members: int, timeout_s: float, interval_s: float
) -> None:
    assert heartbeat_interval_s(num_members, 1.0, timeout_s) == interval_s
