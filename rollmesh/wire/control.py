"""Membership, leases and step reports on the wire (``coordinator.proto``).

A ``*Call`` is the argument of the method of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollmesh.types import (
    Heartbeat,
    Lease,
    LeaseKey,
    MemberReport,
    PolicyVersion,
    Registration,
    Role,
    SamplingSpec,
)
from rollmesh.v1 import coordinator_pb2 as pb
from rollmesh.wire import checks
from rollmesh.wire.enums import LEARNER_PHASES, LEASE_KINDS, ROLES, RUN_STATES
from rollmesh.wire.limits import MAX_LEASES, MAX_MEMBERS, MAX_SAMPLES, MAX_TOKENS
from rollmesh.wire.trajectory import (
    optional_version,
    prompt_id_from_proto,
    prompt_id_to_proto,
    required_version,
    version_to_proto,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The member that calls. ``incarnation`` is new for every start of the member's process."""

    name: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class RegisterCall:
    """A member joins the run.

    Attributes:
        address: the "host:port" of the member's own server.
        num_weight_ranks: the number of the member's processes that take part in weight transfers.
        serving: the version that a rollout worker's engine serves; None for no version, and for any other member.
    """

    caller: Caller
    run_id: str
    role: Role
    address: str
    num_weight_ranks: int
    serving: PolicyVersion | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatCall:
    caller: Caller
    report: MemberReport


@dataclass(frozen=True, slots=True)
class LeaveCall:
    """A member leaves the run.

    Attributes:
        failure: the reason in one sentence; empty where the member leaves in good order.
        is_replaceable: whether the failure is of this process alone, and a new process may take the member's place.
    """

    caller: Caller
    failure: str
    is_replaceable: bool = False


@dataclass(frozen=True, slots=True)
class FailRunCall:
    """A run cannot go on. ``reason`` is one sentence."""

    run_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class CreditGrant:
    """A message of the Lease stream. ``caller`` is None in all messages but the first."""

    caller: Caller | None
    credits: int


@dataclass(frozen=True, slots=True)
class ReportStepCall:
    """The report of one step. ``step`` counts from 1, and is 0 where the run ends without a step. ``version`` is the
    version that the step made."""

    caller: Caller
    step: int
    version: PolicyVersion
    metrics: Mapping[str, float]
    is_last: bool


def caller_from_proto(message: Any) -> Caller:
    """Return the caller of any request with the fields ``name`` and ``incarnation``."""
    return Caller(checks.name(message.name, "name"), checks.name(message.incarnation, "incarnation"))


def register_to_proto(call: RegisterCall) -> pb.RegisterRequest:
    return pb.RegisterRequest(
        run_id=call.run_id,
        role=ROLES.to_proto(call.role),
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        address=call.address,
        num_weight_ranks=call.num_weight_ranks,
        serving=version_to_proto(call.serving),
    )


def register_from_proto(message: pb.RegisterRequest) -> RegisterCall:
    return RegisterCall(
        caller=caller_from_proto(message),
        run_id=checks.name(message.run_id, "run_id"),
        role=ROLES.from_proto(message.role, "role"),
        address=checks.name(message.address, "address"),
        num_weight_ranks=checks.between(message.num_weight_ranks, 0, MAX_MEMBERS, "num_weight_ranks"),
        serving=optional_version(message, "serving"),
    )


def registration_to_proto(registration: Registration) -> pb.RegisterResponse:
    return pb.RegisterResponse(
        heartbeat_interval_ms=checks.milliseconds(registration.heartbeat_interval_s, "heartbeat_interval_ms"),
        member_timeout_ms=checks.milliseconds(registration.member_timeout_s, "member_timeout_ms"),
        committed_version=version_to_proto(registration.committed_version),
        groups_per_batch=registration.groups_per_batch,
        num_steps=registration.num_steps,
        newest_version=version_to_proto(registration.newest_version),
    )


def registration_from_proto(message: pb.RegisterResponse) -> Registration:
    return Registration(
        heartbeat_interval_s=checks.positive_seconds(message.heartbeat_interval_ms, "heartbeat_interval_ms"),
        member_timeout_s=checks.positive_seconds(message.member_timeout_ms, "member_timeout_ms"),
        committed_version=optional_version(message, "committed_version"),
        groups_per_batch=message.groups_per_batch,
        num_steps=message.num_steps,
        newest_version=optional_version(message, "newest_version"),
    )


def lease_key_to_proto(key: LeaseKey) -> pb.LeaseKey:
    return pb.LeaseKey(kind=LEASE_KINDS.to_proto(key.kind), group_id=key.group_id, fencing_token=key.fencing_token)


def lease_key_from_proto(message: pb.LeaseKey, parent: str = "") -> LeaseKey:
    return LeaseKey(
        LEASE_KINDS.from_proto(message.kind, checks.join(parent, "kind")),
        checks.name(message.group_id, checks.join(parent, "group_id")),
        message.fencing_token,
    )


def _lease_keys_from_proto(messages: Sequence[pb.LeaseKey], field: str) -> tuple[LeaseKey, ...]:
    checks.at_most(messages, MAX_LEASES, field)
    return tuple(lease_key_from_proto(message, field) for message in messages)


def heartbeat_call_to_proto(call: HeartbeatCall) -> pb.HeartbeatRequest:
    report = call.report
    return pb.HeartbeatRequest(
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        num_generated_tokens=report.num_generated_tokens,
        num_moves=report.num_moves,
        patience_ms=checks.milliseconds(report.patience_s, "patience_ms"),
        phase=None if report.phase is None else LEARNER_PHASES.to_proto(report.phase),
        renewals=[lease_key_to_proto(key) for key in report.renewals],
    )


def heartbeat_call_from_proto(message: pb.HeartbeatRequest) -> HeartbeatCall:
    phase = message.phase
    report = MemberReport(
        num_generated_tokens=message.num_generated_tokens,
        num_moves=message.num_moves,
        patience_s=message.patience_ms / 1000,
        phase=LEARNER_PHASES.from_proto(phase, "phase") if phase else None,
        renewals=_lease_keys_from_proto(message.renewals, "renewals"),
    )
    return HeartbeatCall(caller_from_proto(message), report)


def heartbeat_to_proto(heartbeat: Heartbeat) -> pb.HeartbeatResponse:
    return pb.HeartbeatResponse(
        run_state=RUN_STATES.to_proto(heartbeat.run_state),
        committed_version=version_to_proto(heartbeat.committed_version),
        failure=heartbeat.failure,
        ended=[lease_key_to_proto(key) for key in heartbeat.ended],
        interval_ms=checks.milliseconds(heartbeat.interval_s, "interval_ms"),
        should_publish=heartbeat.should_publish,
    )


def heartbeat_from_proto(message: pb.HeartbeatResponse) -> Heartbeat:
    return Heartbeat(
        run_state=RUN_STATES.from_proto(message.run_state, "run_state"),
        committed_version=optional_version(message, "committed_version"),
        failure=checks.text(message.failure, "failure"),
        ended=_lease_keys_from_proto(message.ended, "ended"),
        interval_s=message.interval_ms / 1000,
        should_publish=message.should_publish,
    )


def leave_to_proto(call: LeaveCall) -> pb.LeaveRequest:
    return pb.LeaveRequest(
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        failure=call.failure,
        is_replaceable=call.is_replaceable,
    )


def leave_from_proto(message: pb.LeaveRequest) -> LeaveCall:
    return LeaveCall(
        caller_from_proto(message), checks.text(message.failure, "failure"), is_replaceable=message.is_replaceable
    )


def fail_run_to_proto(call: FailRunCall) -> pb.FailRunRequest:
    return pb.FailRunRequest(run_id=call.run_id, reason=call.reason)


def fail_run_from_proto(message: pb.FailRunRequest) -> FailRunCall:
    return FailRunCall(checks.text(message.run_id, "run_id"), checks.text(message.reason, "reason"))


def grant_to_proto(grant: CreditGrant) -> pb.LeaseRequest:
    if grant.caller is None:
        return pb.LeaseRequest(credits=grant.credits)
    return pb.LeaseRequest(name=grant.caller.name, incarnation=grant.caller.incarnation, credits=grant.credits)


def grant_from_proto(message: pb.LeaseRequest) -> CreditGrant:
    caller = caller_from_proto(message) if message.name or message.incarnation else None
    return CreditGrant(caller, message.credits)


def sampling_to_proto(sampling: SamplingSpec) -> pb.SamplingSpec:
    return pb.SamplingSpec(
        temperature=checks.float32(sampling.temperature, "sampling.temperature"),
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
    )


def sampling_from_proto(message: pb.SamplingSpec, field: str = "sampling") -> SamplingSpec:
    temperature = checks.finite(message.temperature, f"{field}.temperature")
    if temperature < 0:
        checks.refuse(f"{field}.temperature", f"is {temperature}, less than 0")
    if not 0 < message.top_p <= 1:
        checks.refuse(f"{field}.top_p", f"is {message.top_p}, not within 0 (exclusive) and 1")
    return SamplingSpec(
        temperature=checks.shortest(temperature),
        top_p=checks.shortest(message.top_p),
        top_k=message.top_k,
        max_new_tokens=checks.between(message.max_new_tokens, 1, MAX_TOKENS, f"{field}.max_new_tokens"),
        seed=message.seed,
    )


def lease_to_proto(lease: Lease) -> pb.LeaseResponse:
    return pb.LeaseResponse(
        group_id=lease.group_id,
        fencing_token=lease.fencing_token,
        kind=LEASE_KINDS.to_proto(lease.kind),
        prompt_id=prompt_id_to_proto(lease.prompt_id),
        sequence=lease.sequence,
        attempt=lease.attempt,
        num_samples=lease.num_samples,
        prompt_json=lease.prompt_json,
        label_json=lease.label_json,
        datasource=lease.datasource,
        sampling=sampling_to_proto(lease.sampling),
        ttl_ms=checks.milliseconds(lease.ttl_s, "ttl_ms"),
    )


def lease_from_proto(message: pb.LeaseResponse) -> Lease:
    return Lease(
        group_id=checks.name(message.group_id, "group_id"),
        fencing_token=message.fencing_token,
        kind=LEASE_KINDS.from_proto(message.kind, "kind"),
        prompt_id=prompt_id_from_proto(checks.required(message, "prompt_id")),
        sequence=message.sequence,
        attempt=message.attempt,
        num_samples=checks.between(message.num_samples, 1, MAX_SAMPLES, "num_samples"),
        prompt_json=checks.text(message.prompt_json, "prompt_json"),
        label_json=checks.text(message.label_json, "label_json"),
        datasource=checks.text(message.datasource, "datasource"),
        sampling=sampling_from_proto(checks.required(message, "sampling")),
        ttl_s=checks.positive_seconds(message.ttl_ms, "ttl_ms"),
    )


def report_step_to_proto(call: ReportStepCall) -> pb.ReportStepRequest:
    return pb.ReportStepRequest(
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        step=call.step,
        version=version_to_proto(call.version),
        metrics=checks.named_numbers(call.metrics, "metrics"),
        is_last=call.is_last,
    )


def report_step_from_proto(message: pb.ReportStepRequest) -> ReportStepCall:
    if message.step == 0 and not message.is_last:
        checks.refuse("step", "is 0; steps count from 1")
    return ReportStepCall(
        caller=caller_from_proto(message),
        step=message.step,
        version=required_version(message, "version"),
        metrics=checks.named_numbers(message.metrics, "metrics"),
        is_last=message.is_last,
    )
