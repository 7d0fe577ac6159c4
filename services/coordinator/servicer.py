"""CoordinatorService: translates between protobuf and the coordinator's own types."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import Announcement
from rollmesh.v1 import coordinator_pb2 as pb
from rollmesh.v1 import coordinator_pb2_grpc as pb_grpc
from rollmesh.weights.plan import PlanMemory
from rollmesh.wire import control, evaluation, status, weights
from services.coordinator.coordinator import Coordinator
from services.coordinator.leases import LeaseLine

MAX_CREDITS = 1_000_000
"""The most credits of one stream; more credits can only be a mistake."""


class CoordinatorServicer(pb_grpc.CoordinatorServiceServicer):
    """Errors are raised; `rollmesh.rpc.status_codes` maps them."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._plans = PlanMemory()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        call = control.register_from_proto(request)
        caller = call.caller
        registration = await self._coordinator.register(
            call.run_id,
            call.role,
            caller.name,
            caller.incarnation,
            call.address,
            call.num_weight_ranks,
            call.serving,
        )
        return control.registration_to_proto(registration)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        call = control.heartbeat_call_from_proto(request)
        caller = call.caller
        answer = self._coordinator.heartbeat(caller.name, caller.incarnation, call.report)
        return control.heartbeat_to_proto(answer)

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        call = control.leave_from_proto(request)
        await self._coordinator.leave(
            call.caller.name, call.caller.incarnation, call.failure, is_replaceable=call.is_replaceable
        )
        return pb.LeaveResponse()

    async def FailRun(self, request: pb.FailRunRequest, context: Any) -> pb.FailRunResponse:
        call = control.fail_run_from_proto(request)
        self._coordinator.fail_run(call.run_id, call.reason)
        return pb.FailRunResponse()

    async def Lease(self, request_iterator: AsyncIterator[pb.LeaseRequest], context: Any) -> None:
        """Write the leases that the dispatcher gives; a second task reads the worker's credits.

        The stream ends when the worker half-closes, when the coordinator closes the line, or when the stream breaks.
        """
        first = control.grant_from_proto(await _first(request_iterator))
        if first.caller is None:
            raise InvalidArgumentError("the first message of a lease stream names its worker", "name")
        line = self._coordinator.open_line(first.caller.name, first.caller.incarnation)
        reader = asyncio.create_task(self._read_credits(line, first.credits, request_iterator), name="lease credits")
        try:
            while (lease := await line.next()) is not None:
                await context.write(control.lease_to_proto(lease))
            if reader.done():
                reader.result()
        finally:
            reader.cancel()
            self._coordinator.dispatcher.close_line(line)
            await asyncio.gather(reader, return_exceptions=True)

    async def _read_credits(self, line: LeaseLine, num_credits: int, requests: AsyncIterator[pb.LeaseRequest]) -> None:
        try:
            self._grant(line, num_credits)
            async for request in requests:
                self._grant(line, control.grant_from_proto(request).credits)
        finally:
            line.close()

    def _grant(self, line: LeaseLine, num_credits: int) -> None:
        if line.credits + num_credits > MAX_CREDITS:
            raise InvalidArgumentError(f"{line.credits + num_credits} credits are more than {MAX_CREDITS}", "credits")
        self._coordinator.dispatcher.grant(line, num_credits)

    async def ReportEvaluation(self, request: pb.ReportEvaluationRequest, context: Any) -> pb.ReportEvaluationResponse:
        call = evaluation.report_evaluation_from_proto(request)
        self._coordinator.report_evaluation(
            call.caller.name, call.caller.incarnation, call.group_id, call.fencing_token, call.samples, call.failure
        )
        return pb.ReportEvaluationResponse()

    async def BeginPublish(self, request: pb.BeginPublishRequest, context: Any) -> pb.BeginPublishResponse:
        # Decoded in a thread: the plan of a mixture takes a third of a second, which would block the event loop.
        call = await asyncio.to_thread(weights.begin_publish_from_proto, request)
        plan = self._plans.find(call.plan, call.plan_digest)
        if plan is None:
            return weights.begin_publish_answer_to_proto(None)
        announcement = Announcement(
            call.version, call.step, plan, call.store_host, call.store_port, call.transfer_deadline_s
        )
        epoch = await self._coordinator.begin_publish(call.caller.name, call.caller.incarnation, announcement)
        return weights.begin_publish_answer_to_proto(epoch)

    async def FinishPublish(self, request: pb.FinishPublishRequest, context: Any) -> pb.FinishPublishResponse:
        call = weights.finish_publish_from_proto(request)
        outcome = await self._coordinator.finish_publish(
            call.caller.name, call.caller.incarnation, call.version, call.digest, call.failure
        )
        return weights.publish_outcome_to_proto(outcome)

    async def ReportStep(self, request: pb.ReportStepRequest, context: Any) -> pb.ReportStepResponse:
        call = control.report_step_from_proto(request)
        self._coordinator.report_step(call.caller.name, call.caller.incarnation, call.step, call.metrics, call.is_last)
        return pb.ReportStepResponse()

    async def GetMeshStatus(self, request: pb.GetMeshStatusRequest, context: Any) -> pb.GetMeshStatusResponse:
        return status.mesh_status_to_proto(await self._coordinator.status())


async def _first(requests: AsyncIterator[pb.LeaseRequest]) -> pb.LeaseRequest:
    async for request in requests:
        return request
    raise InvalidArgumentError("the lease stream ended before it began", "name")
