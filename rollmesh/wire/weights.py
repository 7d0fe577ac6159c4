"""The weight protocol on the wire: plans and epochs (``rollout.proto``), publishing (``coordinator.proto``).

A ``*Call`` is the argument of the method of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rollmesh.types import (
    CommitReport,
    PolicyVersion,
    PublishOutcome,
    ReceiveReport,
    TensorSpec,
    WeightEpoch,
    WeightPlan,
)
from rollmesh.v1 import coordinator_pb2, rollout_pb2
from rollmesh.wire import checks
from rollmesh.wire.control import Caller, caller_from_proto
from rollmesh.wire.limits import MAX_DIMENSIONS, MAX_MEMBERS, MAX_PORT, MAX_TENSORS
from rollmesh.wire.trajectory import required_version, version_to_proto

_LENGTH_DELIMITED = 2
"""The wire type of strings, bytes and embedded messages."""


@dataclass(frozen=True, slots=True)
class BeginPublishCall:
    """ANNOUNCE: the fields of `rollmesh.types.Announcement`. ``plan`` is None where the coordinator holds the plan of
    ``plan_digest`` already."""

    caller: Caller
    version: PolicyVersion
    step: int
    plan: WeightPlan | None
    store_host: str
    store_port: int
    transfer_deadline_s: float
    plan_digest: bytes


@dataclass(frozen=True, slots=True)
class FinishPublishCall:
    """The learner has sent bytes with this digest. Where ``failure`` is not empty, sending failed."""

    caller: Caller
    version: PolicyVersion
    digest: bytes
    failure: str


@dataclass(frozen=True, slots=True)
class PrepareWeightsCall:
    """PREPARE: ``rank`` is the rank of the worker's first process in the epoch. ``plan`` is None where the worker holds
    the plan of ``plan_digest`` already."""

    version: PolicyVersion
    plan: WeightPlan | None
    epoch: WeightEpoch
    rank: int
    transfer_deadline_s: float
    plan_digest: bytes


@dataclass(frozen=True, slots=True)
class EncodedPlan:
    """A plan as the bytes of its message. The coordinator encodes the plan once and sends the bytes to many workers."""

    digest: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class AbortWeightsCall:
    version: PolicyVersion
    reason: str


def plan_to_proto(plan: WeightPlan) -> rollout_pb2.WeightPlan:
    tensors = [rollout_pb2.TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in plan.tensors]
    return rollout_pb2.WeightPlan(tensors=tensors, bucket_starts=plan.bucket_starts, digest=plan.digest)


def plan_from_proto(message: rollout_pb2.WeightPlan, field: str = "plan") -> WeightPlan:
    """Return a plan whose form is right: the bucket starts begin at 0, ascend, and leave no bucket empty.

    `rollmesh.weights.plan` checks the value of the digest, and the model checks the tensors.
    """
    checks.at_most(message.tensors, MAX_TENSORS, f"{field}.tensors")
    if not message.tensors:
        checks.refuse(f"{field}.tensors", "is empty")
    tensors = tuple(_tensor_from_proto(spec, f"{field}.tensors[{i}]") for i, spec in enumerate(message.tensors))
    starts = tuple(message.bucket_starts)
    if starts[:1] != (0,) or starts[-1] >= len(tensors) or any(a >= b for a, b in pairwise(starts)):
        checks.refuse(f"{field}.bucket_starts", f"does not cut {len(tensors)} tensors into buckets")
    return WeightPlan(tensors, starts, checks.digest(message.digest, f"{field}.digest"))


def encode_plan(plan: WeightPlan) -> EncodedPlan:
    """Encode a plan. Encoding takes 7 to 10 µs a tensor, a third of a second for the 46,000 tensors of a mixture of
    experts."""
    return EncodedPlan(plan.digest, plan_to_proto(plan).SerializeToString())


def _plan_or_digest(message: Any) -> tuple[WeightPlan | None, bytes]:
    """Return the plan of a message and the plan's digest. The plan is None where the message only names the plan."""
    plan = plan_from_proto(message.plan) if message.HasField("plan") else None
    if plan is None:
        return None, checks.digest(message.plan_digest, "plan_digest")
    if message.plan_digest not in (b"", plan.digest):
        checks.refuse("plan_digest", "is not the digest of the plan that stands beside it")
    return plan, plan.digest


def _tensor_from_proto(message: rollout_pb2.TensorSpec, field: str) -> TensorSpec:
    checks.at_most(message.shape, MAX_DIMENSIONS, f"{field}.shape")
    return TensorSpec(
        checks.name(message.name, f"{field}.name"), checks.name(message.dtype, f"{field}.dtype"), tuple(message.shape)
    )


def epoch_to_proto(epoch: WeightEpoch) -> rollout_pb2.WeightEpoch:
    return rollout_pb2.WeightEpoch(
        number=epoch.number, store_host=epoch.store_host, store_port=epoch.store_port, world_size=epoch.world_size
    )


def epoch_from_proto(message: rollout_pb2.WeightEpoch, field: str = "epoch") -> WeightEpoch:
    return WeightEpoch(
        number=message.number,
        store_host=checks.name(message.store_host, f"{field}.store_host"),
        store_port=checks.between(message.store_port, 1, MAX_PORT, f"{field}.store_port"),
        world_size=checks.between(message.world_size, 1, MAX_MEMBERS, f"{field}.world_size"),
    )


def begin_publish_to_proto(call: BeginPublishCall) -> coordinator_pb2.BeginPublishRequest:
    return coordinator_pb2.BeginPublishRequest(
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        version=version_to_proto(call.version),
        step=call.step,
        plan=None if call.plan is None else plan_to_proto(call.plan),
        store_host=call.store_host,
        store_port=call.store_port,
        transfer_deadline_ms=checks.milliseconds(call.transfer_deadline_s, "transfer_deadline_ms"),
        plan_digest=call.plan_digest,
    )


def begin_publish_from_proto(message: coordinator_pb2.BeginPublishRequest) -> BeginPublishCall:
    plan, digest = _plan_or_digest(message)
    return BeginPublishCall(
        caller=caller_from_proto(message),
        version=required_version(message, "version"),
        step=message.step,
        plan=plan,
        store_host=checks.name(message.store_host, "store_host"),
        store_port=checks.between(message.store_port, 1, MAX_PORT, "store_port"),
        transfer_deadline_s=checks.positive_seconds(message.transfer_deadline_ms, "transfer_deadline_ms"),
        plan_digest=digest,
    )


def begin_publish_answer_to_proto(epoch: WeightEpoch | None) -> coordinator_pb2.BeginPublishResponse:
    """Return the answer. An epoch of None asks for the plan."""
    if epoch is None:
        return coordinator_pb2.BeginPublishResponse(needs_plan=True)
    return coordinator_pb2.BeginPublishResponse(epoch=epoch_to_proto(epoch))


def begin_publish_answer_from_proto(message: coordinator_pb2.BeginPublishResponse) -> WeightEpoch | None:
    return None if message.needs_plan else epoch_from_proto(checks.required(message, "epoch"))


def finish_publish_to_proto(call: FinishPublishCall) -> coordinator_pb2.FinishPublishRequest:
    return coordinator_pb2.FinishPublishRequest(
        name=call.caller.name,
        incarnation=call.caller.incarnation,
        version=version_to_proto(call.version),
        digest=call.digest,
        failure=call.failure,
    )


def finish_publish_from_proto(message: coordinator_pb2.FinishPublishRequest) -> FinishPublishCall:
    failure = checks.text(message.failure, "failure")
    return FinishPublishCall(
        caller=caller_from_proto(message),
        version=required_version(message, "version"),
        digest=message.digest if failure else checks.digest(message.digest, "digest"),
        failure=failure,
    )


def publish_outcome_to_proto(outcome: PublishOutcome) -> coordinator_pb2.FinishPublishResponse:
    return coordinator_pb2.FinishPublishResponse(
        committed=outcome.is_committed,
        abort_reason=outcome.abort_reason,
        members=outcome.members,
        max_pause_s=outcome.max_pause_s,
    )


def publish_outcome_from_proto(message: coordinator_pb2.FinishPublishResponse) -> PublishOutcome:
    checks.at_most(message.members, MAX_MEMBERS, "members")
    return PublishOutcome(
        is_committed=message.committed,
        abort_reason=message.abort_reason,
        members=tuple(message.members),
        max_pause_s=checks.finite(message.max_pause_s, "max_pause_s"),
    )


def prepare_to_proto(call: PrepareWeightsCall) -> rollout_pb2.PrepareWeightsRequest:
    return rollout_pb2.PrepareWeightsRequest(
        version=version_to_proto(call.version),
        plan=None if call.plan is None else plan_to_proto(call.plan),
        epoch=epoch_to_proto(call.epoch),
        rank=call.rank,
        transfer_deadline_ms=checks.milliseconds(call.transfer_deadline_s, "transfer_deadline_ms"),
        plan_digest=call.plan_digest,
    )


def prepare_to_bytes(call: PrepareWeightsCall, plan: EncodedPlan) -> bytes:
    """Return the bytes that `prepare_to_proto` would serialise to with ``plan`` in it. ``call`` has no plan.

    In a message the fields may follow each other in any order, and an embedded message is its number, its length and
    its bytes. So the plan's bytes are appended as they are, and a plan of megabytes is not encoded for each worker.
    """
    assert call.plan is None
    tag = rollout_pb2.PrepareWeightsRequest.DESCRIPTOR.fields_by_name["plan"].number << 3 | _LENGTH_DELIMITED
    head: bytes = prepare_to_proto(call).SerializeToString()
    return head + _varint(tag) + _varint(len(plan.data)) + plan.data


def _varint(value: int) -> bytes:
    """Encode a number with seven bits a byte, the lowest bits first: 300 becomes AC 02.

    All bytes but the last have their highest bit set.
    """
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def prepare_from_proto(message: rollout_pb2.PrepareWeightsRequest) -> PrepareWeightsCall:
    epoch = epoch_from_proto(checks.required(message, "epoch"))
    plan, digest = _plan_or_digest(message)
    return PrepareWeightsCall(
        version=required_version(message, "version"),
        plan=plan,
        epoch=epoch,
        rank=checks.between(message.rank, 1, epoch.world_size - 1, "rank"),
        transfer_deadline_s=checks.positive_seconds(message.transfer_deadline_ms, "transfer_deadline_ms"),
        plan_digest=digest,
    )


def prepare_answer_to_proto(needs_plan: bool) -> rollout_pb2.PrepareWeightsResponse:
    return rollout_pb2.PrepareWeightsResponse(needs_plan=needs_plan)


def prepare_answer_from_proto(message: rollout_pb2.PrepareWeightsResponse) -> bool:
    """Return whether the worker asks for the plan."""
    return bool(message.needs_plan)


def abort_to_proto(call: AbortWeightsCall) -> rollout_pb2.AbortWeightsRequest:
    return rollout_pb2.AbortWeightsRequest(version=version_to_proto(call.version), reason=call.reason)


def abort_from_proto(message: rollout_pb2.AbortWeightsRequest) -> AbortWeightsCall:
    return AbortWeightsCall(required_version(message, "version"), checks.text(message.reason, "reason"))


def receive_to_proto(version: PolicyVersion) -> rollout_pb2.ReceiveWeightsRequest:
    return rollout_pb2.ReceiveWeightsRequest(version=version_to_proto(version))


def receive_from_proto(message: rollout_pb2.ReceiveWeightsRequest) -> PolicyVersion:
    return required_version(message, "version")


def receive_report_to_proto(report: ReceiveReport) -> rollout_pb2.ReceiveWeightsResponse:
    return rollout_pb2.ReceiveWeightsResponse(
        digests=report.digests, num_bytes=report.num_bytes, transfer_s=report.transfer_s
    )


def receive_report_from_proto(message: rollout_pb2.ReceiveWeightsResponse) -> ReceiveReport:
    checks.at_most(message.digests, MAX_MEMBERS, "digests")
    return ReceiveReport(
        digests=tuple(checks.digest(value, f"digests[{i}]") for i, value in enumerate(message.digests)),
        num_bytes=message.num_bytes,
        transfer_s=checks.finite(message.transfer_s, "transfer_s"),
    )


def commit_to_proto(version: PolicyVersion) -> rollout_pb2.CommitWeightsRequest:
    return rollout_pb2.CommitWeightsRequest(version=version_to_proto(version))


def commit_from_proto(message: rollout_pb2.CommitWeightsRequest) -> PolicyVersion:
    return required_version(message, "version")


def commit_report_to_proto(report: CommitReport) -> rollout_pb2.CommitWeightsResponse:
    return rollout_pb2.CommitWeightsResponse(pause_s=report.pause_s, load_s=report.load_s)


def commit_report_from_proto(message: rollout_pb2.CommitWeightsResponse) -> CommitReport:
    return CommitReport(checks.finite(message.pause_s, "pause_s"), checks.finite(message.load_s, "load_s"))
