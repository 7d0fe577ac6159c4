"""The sentence that says who waits for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollmesh.types import GroupState, LearnerPhase, RunState
from services.coordinator.waiting import View, waiting_for

MOVING = View(
    run_state=RunState.RUNNING,
    has_learner=True,
    learner_phase=LearnerPhase.TRAINING,
    num_rollouts=2,
    num_serving=2,
    publish_stage="",
    num_groups={GroupState.LEASED: 3},
    num_slots=4,
    num_slots_used=4,
    is_closed=False,
    holders=("rollout-0",),
    num_credits=1,
    num_evaluation_open=0,
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run_state": RunState.FINISHED}, ""),
        ({"has_learner": False}, "the mesh waits for the learner to register"),
        ({"learner_phase": LearnerPhase.CHECKPOINTING}, "waits for the learner to write a checkpoint"),
        (
            {"run_state": RunState.STARTING, "learner_phase": LearnerPhase.STARTING},
            "wait for the learner to load its model",
        ),
        ({"publish_stage": "rollout-1 to load version 0.3"}, "the learner waits for rollout-1 to load version 0.3"),
        ({"run_state": RunState.STARTING}, "the rollout workers wait for the learner to publish its first version"),
        ({"num_rollouts": 0, "num_serving": 0}, "no rollout worker is there: start one"),
        ({"num_serving": 0}, "none of the 2 rollout workers serves the committed version"),
        ({"num_evaluation_open": 5}, "the mesh waits for 5 evaluation prompts from rollout-0"),
        ({}, "the learner waits for 3 groups that are leased to rollout-0"),
        ({"num_groups": {GroupState.BATCHED: 4}}, "wait for the learner, which trains on 4 groups"),
        ({"num_groups": {GroupState.READY: 4}}, "wait for the learner to take 4 groups, train and publish"),
        (
            {"num_groups": {GroupState.PENDING: 2}, "num_credits": 0},
            "2 groups wait for a rollout worker that takes leases",
        ),
        ({"run_state": RunState.FINISHING}, "the mesh waits for its members to leave"),
    ],
)
def test_the_sentence_names_the_first_cause(changes: dict[str, object], sentence: str) -> None:
    said = waiting_for(replace(MOVING, **changes))  # type: ignore[arg-type]
    assert (sentence in said) if sentence else not said
