"""The status of the mesh and of its services on the wire."""

from __future__ import annotations

from rollmesh.types import LearnerStatus, MemberStatus, MeshStatus, RolloutStatus
from rollmesh.v1 import coordinator_pb2, learner_pb2, rollout_pb2
from rollmesh.wire import checks
from rollmesh.wire.enums import LEARNER_PHASES, ROLES, RUN_STATES
from rollmesh.wire.evaluation import evaluation_result_from_proto, evaluation_result_to_proto
from rollmesh.wire.limits import MAX_MEMBERS, MAX_NAMED_NUMBERS
from rollmesh.wire.trajectory import optional_version, version_to_proto


def mesh_status_to_proto(status: MeshStatus) -> coordinator_pb2.GetMeshStatusResponse:
    evaluation = status.last_evaluation
    return coordinator_pb2.GetMeshStatusResponse(
        run_id=status.run_id,
        run_state=RUN_STATES.to_proto(status.run_state),
        failure=status.failure,
        step=status.step,
        num_steps=status.num_steps,
        committed_version=version_to_proto(status.committed_version),
        metrics=checks.named_numbers(status.metrics, "metrics"),
        last_evaluation=None if evaluation is None else evaluation_result_to_proto(evaluation),
        num_groups=status.num_groups,
        num_slots=status.num_slots,
        num_slots_used=status.num_slots_used,
        generated_tokens_per_s=status.generated_tokens_per_s,
        num_generated_tokens=status.num_generated_tokens,
        members=[member_status_to_proto(member) for member in status.members],
        waiting_for=status.waiting_for,
    )


def mesh_status_from_proto(message: coordinator_pb2.GetMeshStatusResponse) -> MeshStatus:
    checks.at_most(message.members, MAX_MEMBERS, "members")
    checks.at_most(message.num_groups, MAX_NAMED_NUMBERS, "num_groups")
    has_evaluation = message.HasField("last_evaluation")
    return MeshStatus(
        run_id=message.run_id,
        run_state=RUN_STATES.from_proto(message.run_state, "run_state"),
        failure=message.failure,
        step=message.step,
        num_steps=message.num_steps,
        committed_version=optional_version(message, "committed_version"),
        metrics=checks.named_numbers(message.metrics, "metrics"),
        last_evaluation=(
            evaluation_result_from_proto(message.last_evaluation, "last_evaluation") if has_evaluation else None
        ),
        num_groups=dict(message.num_groups),
        num_slots=message.num_slots,
        num_slots_used=message.num_slots_used,
        generated_tokens_per_s=checks.finite(message.generated_tokens_per_s, "generated_tokens_per_s"),
        num_generated_tokens=message.num_generated_tokens,
        members=tuple(member_status_from_proto(member, f"members[{i}]") for i, member in enumerate(message.members)),
        waiting_for=message.waiting_for,
    )


def member_status_to_proto(status: MemberStatus) -> coordinator_pb2.MemberStatus:
    return coordinator_pb2.MemberStatus(
        name=status.name,
        role=ROLES.to_proto(status.role),
        address=status.address,
        version=version_to_proto(status.version),
        is_serving=status.is_serving,
        heartbeat_age_s=status.heartbeat_age_s,
        num_leases=status.num_leases,
    )


def member_status_from_proto(message: coordinator_pb2.MemberStatus, field: str = "member") -> MemberStatus:
    return MemberStatus(
        name=message.name,
        role=ROLES.from_proto(message.role, f"{field}.role"),
        address=message.address,
        version=optional_version(message, "version"),
        is_serving=message.is_serving,
        heartbeat_age_s=checks.finite(message.heartbeat_age_s, f"{field}.heartbeat_age_s"),
        num_leases=message.num_leases,
    )


def rollout_status_to_proto(status: RolloutStatus) -> rollout_pb2.GetRolloutStatusResponse:
    return rollout_pb2.GetRolloutStatusResponse(
        version=version_to_proto(status.version),
        num_groups_open=status.num_groups_open,
        num_samples_generating=status.num_samples_generating,
        num_samples_scoring=status.num_samples_scoring,
        num_generated_tokens=status.num_generated_tokens,
        num_groups_committed=status.num_groups_committed,
    )


def rollout_status_from_proto(message: rollout_pb2.GetRolloutStatusResponse) -> RolloutStatus:
    return RolloutStatus(
        version=optional_version(message, "version"),
        num_groups_open=message.num_groups_open,
        num_samples_generating=message.num_samples_generating,
        num_samples_scoring=message.num_samples_scoring,
        num_generated_tokens=message.num_generated_tokens,
        num_groups_committed=message.num_groups_committed,
    )


def learner_status_to_proto(status: LearnerStatus) -> learner_pb2.GetLearnerStatusResponse:
    return learner_pb2.GetLearnerStatusResponse(
        phase=LEARNER_PHASES.to_proto(status.phase),
        num_steps=status.num_steps,
        version=version_to_proto(status.version),
        phase_s=status.phase_s,
    )


def learner_status_from_proto(message: learner_pb2.GetLearnerStatusResponse) -> LearnerStatus:
    return LearnerStatus(
        phase=LEARNER_PHASES.from_proto(message.phase, "phase"),
        num_steps=message.num_steps,
        version=optional_version(message, "version"),
        phase_s=checks.finite(message.phase_s, "phase_s"),
    )
