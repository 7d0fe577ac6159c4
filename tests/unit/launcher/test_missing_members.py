"""A running process that the coordinator has dropped is noticed, and a process that is still starting is not."""

from __future__ import annotations

from pathlib import Path

from rollmesh.types import MemberStatus, MeshStatus, Role, RunState
from services.launcher.missing_members import MISSING_S, MissingMembers
from services.launcher.processes import ServiceProcess


class _Rig:
    """One worker, started at 100 s, and the statuses of its run."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.missing = MissingMembers(lambda: self.now_s)
        self.worker = ServiceProcess("rollout-0", [], Path("rollout-0.log"), started_at=100.0)

    def look(self, after_s: float, heartbeat_age_s: float | None) -> bool:
        """Return whether the worker is missing ``after_s`` later, with this last heartbeat; None: it is no member."""
        self.now_s += after_s
        return self.missing.look(_status(heartbeat_age_s), [self.worker]) == [self.worker]


def _status(heartbeat_age_s: float | None) -> MeshStatus:
    members = []
    if heartbeat_age_s is not None:
        members = [MemberStatus("rollout-0", Role.ROLLOUT, "127.0.0.1:1", None, True, heartbeat_age_s, 0)]
    return MeshStatus(
        run_id="run",
        run_state=RunState.RUNNING,
        failure="",
        step=1,
        num_steps=2,
        committed_version=None,
        metrics={},
        last_evaluation=None,
        num_groups={},
        num_slots=1,
        num_slots_used=0,
        generated_tokens_per_s=0.0,
        num_generated_tokens=0,
        members=tuple(members),
        waiting_for="",
    )


def test_a_member_that_was_dropped_and_does_not_come_back_is_missing() -> None:
    rig = _Rig()
    assert not rig.look(10.0, 0.5)
    assert not rig.look(30.0, None)
    assert not rig.look(MISSING_S, None)
    assert rig.look(1.0, None)


def test_a_member_that_registers_again_is_not_missing() -> None:
    rig = _Rig()
    rig.look(10.0, 0.5)
    rig.look(30.0, None)
    assert not rig.look(MISSING_S, 0.5)
    assert not rig.look(1.0, None)
    assert not rig.look(MISSING_S, None)


def test_a_process_that_was_no_member_yet_is_still_starting() -> None:
    rig = _Rig()
    assert not rig.look(10.0, None)
    assert not rig.look(10 * MISSING_S, None)


def test_the_place_of_a_former_process_in_the_status_does_not_make_a_new_process_a_member() -> None:
    rig = _Rig()
    rig.look(10.0, 0.5)
    rig.now_s = rig.worker.started_at = 200.0
    assert not rig.look(5.0, 20.0)  # the last heartbeat is of the former process
    assert not rig.look(10.0, None)  # now the coordinator has dropped that process
    assert not rig.look(10 * MISSING_S, None)
