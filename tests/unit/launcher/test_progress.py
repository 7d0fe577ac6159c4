"""The progress line says the same to terminals and logs, each in its manner."""

from __future__ import annotations

import dataclasses
import io

from rollmesh.types import EvaluationResult, MeshStatus, PolicyVersion, RunState
from services.launcher.progress import ProgressLine, format_status

VERSION = PolicyVersion(0, 11)
STATUS = MeshStatus(
    run_id="tiny",
    run_state=RunState.RUNNING,
    failure="",
    step=12,
    num_steps=60,
    committed_version=VERSION,
    metrics={"reward/mean": 0.4321, "staleness/mean": 0.75},
    last_evaluation=EvaluationResult(PolicyVersion(0, 10), 10, 512, 0, 0.625, 0.02, 20.0, 0.0),
    num_groups={"ready": 14, "leased": 20},
    num_slots=64,
    num_slots_used=50,
    generated_tokens_per_s=5123.4,
    num_generated_tokens=99999,
    members=(),
    waiting_for="",
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_has_what_a_person_asks_for() -> None:
    assert format_status(STATUS) == (
        "step 12/60 · reward 0.432 · pass@1 0.625 (v10) · 5,123 tok/s · staleness 0.75 · queue 14 · slots 50/64 · v11"
    )


def test_the_line_says_how_many_groups_were_filtered() -> None:
    status = dataclasses.replace(STATUS, num_groups={"ready": 14, "filtered": 120})
    assert "· queue 14 · filtered 120 · slots 50/64 ·" in format_status(status)


def test_a_start_says_who_is_there_and_who_is_awaited() -> None:
    status = dataclasses.replace(STATUS, run_state=RunState.STARTING, waiting_for="waiting for rollout-0")
    assert format_status(status) == "starting · up: nobody yet · waiting for rollout-0"
    assert format_status(status, ["reward", "learner"]) == "starting · 0 of 2 services up · loading reward, learner"


def test_a_terminal_sees_one_line_that_changes() -> None:
    stream = _Terminal()
    line = ProgressLine(stream)
    line.show(STATUS)
    line.show(STATUS)
    line.finish()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 2


def test_a_log_gets_a_line_for_each_step_and_not_for_each_second() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for step in (12, 12, 12, 13):
        line.show(dataclasses.replace(STATUS, step=step))
    assert stream.getvalue().count("\n") == 2
