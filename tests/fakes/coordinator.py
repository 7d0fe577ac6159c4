"""A coordinator whose answers the test chooses: `CoordinatorService` without ledger, versions or clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Any

from rollmesh.errors import RollMeshError, SupersededError, UnknownMemberError
from rollmesh.rpc.server import Server
from rollmesh.types import Heartbeat, Lease, MeshStatus, PublishOutcome, Registration, RunState, WeightEpoch
from rollmesh.v1 import coordinator_pb2 as pb
from rollmesh.v1 import coordinator_pb2_grpc as pb_grpc
from rollmesh.weights.plan import PlanMemory
from rollmesh.wire import control, evaluation, status, weights


class FakeCoordinator(pb_grpc.CoordinatorServiceServicer):
    """A coordinator that records the calls of the members, and grants the leases in ``leases`` as credits allow.

    Attributes:
        registration: the answer to members that register.
        heartbeat: the answer to members' heartbeats.
        errors: the errors of each method's next calls, in order, by the method's name.
        stalled: the names of methods that do not answer.
        num_calls: the number of calls of each method, by the method's name.
        incarnations: the incarnation of each member, by the member's name.
        leases: the leases to grant, in order.
        grants: the credits of each Lease stream, message by message.
        cut_after: the number of leases after which a stream is cut without warning; None cuts no stream.
    """

    def __init__(self, *, heartbeat_interval_s: float = 0.02, member_timeout_s: float = 5.0) -> None:
        self.registration = Registration(heartbeat_interval_s, member_timeout_s, None, 4, 10)
        self.heartbeat = Heartbeat(RunState.RUNNING, None)
        self.errors: dict[str, deque[RollMeshError]] = {}
        self.stalled: set[str] = set()
        self.num_calls: Counter[str] = Counter()
        self.incarnations: dict[str, str] = {}
        self.registered: list[control.RegisterCall] = []
        self.heartbeats: list[control.HeartbeatCall] = []
        self.left: list[control.LeaveCall] = []
        self.leases: asyncio.Queue[Lease] = asyncio.Queue()
        self.grants: list[list[int]] = []
        self.cut_after: int | None = None
        self.evaluations: list[evaluation.ReportEvaluationCall] = []
        self.begun: list[weights.BeginPublishCall] = []
        self.finished: list[weights.FinishPublishCall] = []
        self._plans = PlanMemory()
        self.steps: list[control.ReportStepCall] = []
        self.mesh_status: MeshStatus | None = None

    def serve(self, address: str = "127.0.0.1:0") -> Server:
        """Return a server that drops its open calls at the end of its block, as a killed process does."""
        service = (pb_grpc.add_CoordinatorServiceServicer_to_server, self)
        return Server(address, {"rollmesh.v1.CoordinatorService": service}, grace_s=0.0)

    def forget_plan(self) -> None:
        """Forget the last plan, as a coordinator that was started again does."""
        self._plans = PlanMemory()

    def fail_next(self, method: str, *errors: RollMeshError) -> None:
        self.errors.setdefault(method, deque()).extend(errors)

    async def _enter(self, method: str) -> None:
        self.num_calls[method] += 1
        if method in self.stalled:
            await asyncio.Event().wait()
        if self.errors.get(method):
            raise self.errors[method].popleft()

    def _check(self, caller: control.Caller) -> None:
        incarnation = self.incarnations.get(caller.name)
        if incarnation is None:
            raise UnknownMemberError(f"{caller.name} is not a member")
        if incarnation != caller.incarnation:
            raise SupersededError(f"another incarnation of {caller.name} has registered")

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        await self._enter("Register")
        call = control.register_from_proto(request)
        self.registered.append(call)
        self.incarnations[call.caller.name] = call.caller.incarnation
        return control.registration_to_proto(self.registration)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        await self._enter("Heartbeat")
        call = control.heartbeat_call_from_proto(request)
        self._check(call.caller)
        self.heartbeats.append(call)
        return control.heartbeat_to_proto(self.heartbeat)

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        await self._enter("Leave")
        call = control.leave_from_proto(request)
        self.left.append(call)
        self.incarnations.pop(call.caller.name, None)
        return pb.LeaveResponse()

    async def FailRun(self, request: pb.FailRunRequest, context: Any) -> pb.FailRunResponse:
        await self._enter("FailRun")
        return pb.FailRunResponse()

    async def Lease(self, request_iterator: AsyncIterator[pb.LeaseRequest], context: Any) -> AsyncIterator[Any]:
        await self._enter("Lease")
        first = control.grant_from_proto(await anext(request_iterator))
        assert first.caller is not None
        self._check(first.caller)
        grants = [first.credits]
        self.grants.append(grants)
        credit = asyncio.Semaphore(first.credits)

        async def read() -> None:
            async for request in request_iterator:
                grants.append(request.credits)
                for _ in range(request.credits):
                    credit.release()

        reader = asyncio.create_task(read())
        try:
            for num_sent in range(1_000_000):
                if num_sent == self.cut_after:
                    self.cut_after = None
                    return
                await credit.acquire()
                yield control.lease_to_proto(await self.leases.get())
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def ReportEvaluation(self, request: pb.ReportEvaluationRequest, context: Any) -> pb.ReportEvaluationResponse:
        await self._enter("ReportEvaluation")
        call = evaluation.report_evaluation_from_proto(request)
        self._check(call.caller)
        self.evaluations.append(call)
        return pb.ReportEvaluationResponse()

    async def BeginPublish(self, request: pb.BeginPublishRequest, context: Any) -> pb.BeginPublishResponse:
        await self._enter("BeginPublish")
        call = weights.begin_publish_from_proto(request)
        self._check(call.caller)
        self.begun.append(call)
        if self._plans.find(call.plan, call.plan_digest) is None:
            return weights.begin_publish_answer_to_proto(None)
        return weights.begin_publish_answer_to_proto(WeightEpoch(1, call.store_host, call.store_port, 3))

    async def FinishPublish(self, request: pb.FinishPublishRequest, context: Any) -> pb.FinishPublishResponse:
        await self._enter("FinishPublish")
        call = weights.finish_publish_from_proto(request)
        self._check(call.caller)
        self.finished.append(call)
        return weights.publish_outcome_to_proto(
            PublishOutcome(not call.failure, call.failure, () if call.failure else ("rollout-0",), 0.1)
        )

    async def ReportStep(self, request: pb.ReportStepRequest, context: Any) -> pb.ReportStepResponse:
        await self._enter("ReportStep")
        call = control.report_step_from_proto(request)
        self._check(call.caller)
        self.steps.append(call)
        return pb.ReportStepResponse()

    async def GetMeshStatus(self, request: pb.GetMeshStatusRequest, context: Any) -> pb.GetMeshStatusResponse:
        await self._enter("GetMeshStatus")
        assert self.mesh_status is not None, "the test has set no status"
        return status.mesh_status_to_proto(self.mesh_status)
