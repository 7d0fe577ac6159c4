"""Calls the coordinator for a member: takes and returns nouns of `rollmesh.types`.

Every call has a deadline. The client repeats a call that is safe to repeat, within the deadline, in two cases: the
coordinator cannot be reached, or the coordinator does not know the caller. In the second case the caller's heartbeats
are about to register the caller again (`rollmesh.rpc.membership`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollmesh.errors import RollMeshError, UnavailableError, UnknownMemberError
from rollmesh.rpc.channel import Connection
from rollmesh.rpc.lease_stream import LeaseStream
from rollmesh.rpc.retry import call_unary, retry
from rollmesh.rpc.status_codes import translate_errors
from rollmesh.types import (
    Announcement,
    EvaluationSample,
    Heartbeat,
    MemberReport,
    MeshStatus,
    PolicyVersion,
    PublishOutcome,
    Registration,
    Role,
    WeightEpoch,
    WeightPlan,
)
from rollmesh.v1 import coordinator_pb2, coordinator_pb2_grpc
from rollmesh.wire import control, evaluation, status, weights

_REGISTER_ATTEMPT_S = 10.0
NOTHING_TO_REPORT = MemberReport()


class CoordinatorClient(Connection):
    """A member's connection to the coordinator. Belongs to the running event loop; `close` it when done.

    Args:
        address: the coordinator's "host:port".
        name: the member's name, e.g. "rollout-0".
        incarnation: the id of this start of the process; None draws a random id.
        place: the configuration path of the address, for errors.

    Raises:
        ConfigError: the address is malformed.
    """

    def __init__(
        self, address: str, name: str, incarnation: str | None = None, *, place: str = "coordinator.address"
    ) -> None:
        super().__init__(f"coordinator at {address}", address, place)
        self.caller = control.Caller(name, incarnation or uuid.uuid4().hex)
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._known_plan = b""

    async def register(
        self,
        run_id: str,
        role: Role,
        address: str,
        num_weight_ranks: int = 0,
        serving: PolicyVersion | None = None,
        *,
        timeout_s: float = 60.0,
    ) -> Registration:
        """Join the run for the first time or again.

        Args:
            run_id: the run's name.
            role: the member's role.
            address: the "host:port" of the member's own server.
            num_weight_ranks: the number of the member's processes that take part in weight transfers.
            serving: the version that a rollout worker's engine serves; None for no version.
            timeout_s: time for all tries together; long enough for the coordinator to start.

        Raises:
            UnavailableError, DeadlineError: the coordinator did not answer in time.
            InvalidArgumentError: the coordinator serves another run.
            RunEndedError: the run is over.
        """
        call = control.RegisterCall(self.caller, run_id, role, address, num_weight_ranks, serving)
        request = control.register_to_proto(call)
        answer = await call_unary(
            self._stub.Register,
            request,
            timeout_s=timeout_s,
            attempt_timeout_s=_REGISTER_ATTEMPT_S,
            peer=self.peer,
        )
        return control.registration_from_proto(answer)

    async def heartbeat(self, report: MemberReport = NOTHING_TO_REPORT, *, timeout_s: float = 5.0) -> Heartbeat:
        """Send one heartbeat in one try.

        Args:
            report: how the member's work moves.
            timeout_s: time for the answer.

        Raises:
            UnknownMemberError: the coordinator does not know the member; the member must register again.
            UnavailableError, DeadlineError: the coordinator did not answer.
        """
        request = control.heartbeat_call_to_proto(control.HeartbeatCall(self.caller, report))
        with translate_errors(self.peer):
            answer = await self._stub.Heartbeat(request, timeout=timeout_s)
        return control.heartbeat_from_proto(answer)

    async def leave(self, failure: str = "", *, is_replaceable: bool = False, timeout_s: float = 5.0) -> None:
        """Leave the run.

        Args:
            failure: why the member cannot go on; empty where the member leaves in order.
            is_replaceable: whether a new process may take the member's place, so that the run goes on.
            timeout_s: time for all tries together.
        """
        request = control.leave_to_proto(control.LeaveCall(self.caller, failure, is_replaceable))
        await call_unary(self._stub.Leave, request, timeout_s=timeout_s, peer=self.peer)

    async def fail_run(self, run_id: str, reason: str, *, timeout_s: float = 2.0) -> None:
        """Tell the coordinator that the run cannot go on. A caller needs the run's name and no membership.

        Raises:
            UnavailableError, DeadlineError: the coordinator did not answer in time.
            InvalidArgumentError: the coordinator serves another run.
        """
        request = control.fail_run_to_proto(control.FailRunCall(run_id, reason))
        await call_unary(self._stub.FailRun, request, timeout_s=timeout_s, peer=self.peer)

    def lease_stream(self, *, lost_timeout_s: float = 30.0) -> LeaseStream:
        """Return the stream of the member's leases. The stream tries to connect for ``lost_timeout_s`` at most."""
        return LeaseStream(self._stub.Lease, self.caller, peer=self.peer, lost_timeout_s=lost_timeout_s)

    async def report_evaluation(
        self,
        group_id: str,
        fencing_token: int,
        samples: Sequence[EvaluationSample],
        failure: str = "",
        *,
        timeout_s: float = 30.0,
    ) -> None:
        """Report the result of one evaluation lease: its samples, or the reason of its failure.

        Raises:
            SupersededError: the lease has expired.
        """
        call = evaluation.ReportEvaluationCall(self.caller, group_id, fencing_token, tuple(samples), failure)
        await self._call(self._stub.ReportEvaluation, evaluation.report_evaluation_to_proto(call), timeout_s)

    async def begin_publish(self, announcement: Announcement, *, timeout_s: float) -> WeightEpoch:
        """ANNOUNCE and PREPARE a version. On return the members of the epoch are receiving.

        The client sends the plan if the coordinator has not got the plan before, or asks for the plan again.

        Args:
            announcement: the version to publish.
            timeout_s: time for all tries together. The time includes waiting for workers and for a pinned evaluation.

        Raises:
            DeadlineError, UnavailableError: the members could not be prepared in time.
            SupersededError: the version is not newer than the committed one.
        """
        digest = announcement.plan.digest
        epoch: WeightEpoch | None = None
        if digest == self._known_plan:
            epoch = await self._begin_publish(announcement, None, timeout_s)
        if epoch is None:
            epoch = await self._begin_publish(announcement, announcement.plan, timeout_s)
        if epoch is None:
            raise RollMeshError("the coordinator asks for the weight plan that it was sent")
        self._known_plan = digest
        return epoch

    async def _begin_publish(
        self, announced: Announcement, plan: WeightPlan | None, timeout_s: float
    ) -> WeightEpoch | None:
        call = weights.BeginPublishCall(
            self.caller,
            announced.version,
            announced.step,
            plan,
            announced.store_host,
            announced.store_port,
            announced.transfer_deadline_s,
            announced.plan.digest,
        )
        answer = await self._call(self._stub.BeginPublish, weights.begin_publish_to_proto(call), timeout_s)
        return weights.begin_publish_answer_from_proto(answer)

    async def finish_publish(
        self, version: PolicyVersion, digest: bytes, failure: str = "", *, timeout_s: float
    ) -> PublishOutcome:
        """VERIFY and COMMIT a version whose bytes have ``digest``, or ABORT the version because of ``failure``."""
        call = weights.FinishPublishCall(self.caller, version, digest, failure)
        answer = await self._call(self._stub.FinishPublish, weights.finish_publish_to_proto(call), timeout_s)
        return weights.publish_outcome_from_proto(answer)

    async def report_step(
        self,
        step: int,
        version: PolicyVersion,
        metrics: Mapping[str, float],
        is_last: bool,
        *,
        timeout_s: float = 30.0,
    ) -> None:
        """Report the metrics of one optimiser batch. All metrics are finite; ``version`` is the version that the step
        made."""
        call = control.ReportStepCall(self.caller, step, version, metrics, is_last)
        await self._call(self._stub.ReportStep, control.report_step_to_proto(call), timeout_s)

    async def status(self, *, timeout_s: float = 5.0) -> MeshStatus:
        """Return the state of the mesh. A caller needs no membership."""
        request = coordinator_pb2.GetMeshStatusRequest()
        answer = await call_unary(self._stub.GetMeshStatus, request, timeout_s=timeout_s, peer=self.peer)
        return status.mesh_status_from_proto(answer)

    async def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        """Make a call for a member. Repeat the call also while the coordinator does not know the member."""

        async def attempt(left_s: float) -> Any:
            try:
                with translate_errors(self.peer):
                    return await method(request, timeout=left_s)
            except UnknownMemberError as error:
                raise UnavailableError(str(error)) from error

        return await retry(attempt, timeout_s=timeout_s)
