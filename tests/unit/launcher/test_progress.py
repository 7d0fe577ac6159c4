"""The progress line says the same to terminals and logs, each in its manner."""

from __future__ import annotations

import dataclasses
import io

from rollmesh.types import EvaluationResult, MeshStatus, PolicyVersion, RunState
from services.launcher.progress import ProgressLine, fit, format_status

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
    assert "· filtered 120 · queue 14 · slots 50/64 ·" in format_status(status)


def test_a_start_says_who_is_there_and_who_is_awaited() -> None:
    status = dataclasses.replace(STATUS, run_state=RunState.STARTING, waiting_for="waiting for rollout-0")
    assert format_status(status) == "starting · waiting for rollout-0 · up: nobody yet"
    assert format_status(status, ["reward", "learner"]) == "starting · loading reward, learner · 0 of 2 up"


def test_eighty_columns_show_who_waits_for_whom_and_no_half_words() -> None:
    sentence = "the learner waits for 20 groups that are leased to rollout-0"
    stream = _Terminal()
    ProgressLine(stream).show(dataclasses.replace(STATUS, waiting_for=sentence))
    line = stream.getvalue().removeprefix("\r\x1b[K")
    assert line == f"00:00 step 12/60 · {sentence}"
    assert fit(["00:00 step 12/60", sentence, "reward 0.432", "5,123 tok/s"], 99) == f"{line} · reward 0.432"


def test_a_sentence_that_is_wider_than_the_terminal_is_cut_visibly() -> None:
    assert fit(["step 1/2", "the learner waits"], 20) == "step 1/2 · the lear…"
    assert fit(["step 1/2"], 4) == "step"


def test_a_terminal_sees_one_line_that_changes() -> None:
    stream = _Terminal()
    line = ProgressLine(stream)
    line.show(STATUS)
    line.show(STATUS)
    line.finish()
    line.finish()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 2


def test_a_log_gets_a_line_for_each_step_and_not_for_each_second() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for step in (12, 12, 12, 13):
        line.show(dataclasses.replace(STATUS, step=step))
    assert stream.getvalue().count("\n") == 2
