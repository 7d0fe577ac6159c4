"""The sentence that says which part of the mesh waits, and for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rollmesh.types import GroupState, LearnerPhase, RunState


@dataclass(frozen=True, slots=True)
class View:
    """The state of the mesh from which `waiting_for` makes its sentence.

    Attributes:
        has_learner: whether a learner is a member.
        learner_phase: the learner's phase; None until the learner's first heartbeat.
        num_rollouts: number of rollout workers that are members.
        num_serving: number of rollout workers that may get training leases.
        publish_stage: a clause that says for what the current publish waits; empty if there is no publish.
        num_groups: number of groups in each state.
        num_slots: slots of the run.
        num_slots_used: groups that hold a slot.
        is_closed: whether no group will be opened any more.
        holders: names of the members that hold leases.
        num_credits: leases that eligible workers would take now.
        num_evaluation_open: prompts of the evaluation round that have no result yet.
        memory_shortage: the memory that Redis uses, if lack of memory keeps groups from being opened; else empty.
    """

    run_state: RunState
    has_learner: bool
    learner_phase: LearnerPhase | None
    num_rollouts: int
    num_serving: int
    publish_stage: str
    num_groups: Mapping[GroupState, int]
    num_slots: int
    num_slots_used: int
    is_closed: bool
    holders: tuple[str, ...]
    num_credits: int
    num_evaluation_open: int
    memory_shortage: str = ""


def waiting_for(view: View) -> str:
    """Return one sentence that says who waits for whom. The search goes from the pipeline's end to its beginning."""
    if view.run_state.is_over:
        return ""
    if not view.has_learner:
        return "the mesh waits for the learner to register"
    if view.publish_stage:
        return f"the learner waits for {view.publish_stage}"
    if view.learner_phase is LearnerPhase.CHECKPOINTING:
        return "the mesh waits for the learner to write a checkpoint"
    if view.learner_phase is LearnerPhase.STARTING:
        return "the rollout workers wait for the learner to load its model"
    if view.run_state is RunState.STARTING:
        return "the rollout workers wait for the learner to publish its first version"
    if not view.num_serving:
        return _nobody_serves(view)
    if view.num_evaluation_open:
        holders = f" from {', '.join(view.holders)}" if view.holders else ""
        return f"the mesh waits for {view.num_evaluation_open} evaluation prompts{holders}"
    if view.run_state is RunState.FINISHING:
        return "the mesh waits for its members to leave"
    return _in_the_line(view)


def _nobody_serves(view: View) -> str:
    if not view.num_rollouts:
        return "the learner waits for groups and no rollout worker is there: start one"
    return (
        f"the learner waits for groups, but none of the {view.num_rollouts} rollout workers serves the committed "
        "version: they get it with the next publish"
    )


def _in_the_line(view: View) -> str:
    count = {state: view.num_groups.get(state, 0) for state in GroupState}
    if count[GroupState.BATCHED]:
        return f"the rollout workers wait for the learner, which trains on {count[GroupState.BATCHED]} groups"
    if count[GroupState.LEASED]:
        holders = ", ".join(view.holders) or "workers that are gone"
        return f"the learner waits for {count[GroupState.LEASED]} groups that are leased to {holders}"
    if count[GroupState.PENDING]:
        if not view.num_credits:
            return f"{count[GroupState.PENDING]} groups wait for a rollout worker that takes leases"
        return f"{count[GroupState.PENDING]} groups wait to be leased"
    if view.is_closed or view.num_slots_used >= view.num_slots:
        ready = count[GroupState.READY]
        return f"the rollout workers wait for the learner to take {ready} groups, train and publish"
    if view.memory_shortage:
        return (
            f"the mesh waits for memory in Redis, which uses {view.memory_shortage}: groups keep their memory until a "
            "checkpoint covers them; raise replay.memory_limit_bytes (or maxmemory), or lower "
            "learner.checkpoint.every_steps"
        )
    return "the mesh waits for the coordinator to open groups"
