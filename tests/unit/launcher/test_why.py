"""`rollmesh why` says who waits for whom, and what would end the wait."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError, UnavailableError
from rollmesh.types import MemberStatus, MeshStatus, PolicyVersion, Role, RunState
from services.launcher.why import explain, show

WORKER = MemberStatus("rollout-0", Role.ROLLOUT, "127.0.0.1:1", PolicyVersion(0, 4), True, 0.3, 3)
STATUS = MeshStatus(
    run_id="run",
    run_state=RunState.RUNNING,
    failure="",
    step=4,
    num_steps=20,
    committed_version=PolicyVersion(0, 4),
    metrics={},
    last_evaluation=None,
    num_groups={"leased": 3},
    num_slots=8,
    num_slots_used=3,
    generated_tokens_per_s=0.0,
    num_generated_tokens=0,
    members=(WORKER,),
    waiting_for="the learner waits for 3 groups that are leased to rollout-0",
)


def test_the_head_is_the_coordinators_sentence_and_each_worker_is_explained() -> None:
    assert explain(STATUS) == [
        "the learner waits for 3 groups that are leased to rollout-0 (step 4 of 20)",
        "rollout-0 works on 3 groups",
    ]
    assert explain(replace(STATUS, waiting_for=""))[0] == "the run moves: step 4 of 20 is the last that ended"


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"members": (replace(WORKER, heartbeat_age_s=12.4),)}, "rollout-0 has sent no heartbeat for 12 s"),
        ({"members": ()}, "no rollout worker is there: start one"),
        (
            {"members": (replace(WORKER, num_leases=0, is_serving=False, version=PolicyVersion(0, 3)),)},
            "rollout-0 gets no leases: it serves version 0.3 and 0.4 is committed; the next publish",
        ),
        (
            {"members": (replace(WORKER, num_leases=0, is_serving=False, version=None),), "committed_version": None},
            "rollout-0 gets no leases: no version is committed yet",
        ),
        ({"num_slots_used": 8}, "all 8 slots are held; the commit of the next version frees"),
        ({"num_groups": {"pending": 2}}, "2 groups wait to be leased"),
        ({"num_groups": {"ready": 2}}, "2 groups wait for the learner"),
        ({"num_groups": {"batched": 4}}, "the learner has 4 groups in work"),
        ({"run_state": RunState.FAILED, "failure": "nothing moved"}, "the run is over: failed: nothing moved"),
    ],
)
def test_each_hindrance_is_said_with_what_ends_it(changes: dict[str, object], fact: str) -> None:
    assert any(fact in said for said in explain(replace(STATUS, **changes)))  # type: ignore[arg-type]


def test_a_run_that_has_ended_is_explained_by_its_accounting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mesh.yaml").touch()
    books = {
        "state": "failed",
        "reason": "rollout-0 died",
        "first_cause": {"process": "rollout-0", "log": "logs/r.log"},
    }
    (tmp_path / "accounting.json").write_text(json.dumps(books))
    assert show(str(tmp_path), is_json=True) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts[:2] == ["the run is over: failed: rollout-0 died", "rollout-0 failed first; its log is logs/r.log"]


def test_an_address_without_a_coordinator_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.launcher.why.DEADLINE_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UnavailableError, match=r"no coordinator answers at .* within 0\.3 s"):
            show(f"127.0.0.1:{silent.getsockname()[1]}", is_json=False)


def test_a_folder_without_a_run_and_an_address_without_a_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        show(str(tmp_path), is_json=False)
    with pytest.raises(ConfigError, match="leaves the port open"):
        show("127.0.0.1:0", is_json=False)
