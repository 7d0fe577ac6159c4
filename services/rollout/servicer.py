"""`RolloutService`: passes the coordinator's calls to the weight protocol, and sends the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rollmesh.rpc.server import Service
from rollmesh.types import RolloutStatus
from rollmesh.v1 import rollout_pb2, rollout_pb2_grpc
from rollmesh.weights.plan import PlanMemory
from rollmesh.wire.status import rollout_status_to_proto
from rollmesh.wire.weights import (
    abort_from_proto,
    commit_from_proto,
    commit_report_to_proto,
    prepare_answer_to_proto,
    prepare_from_proto,
    receive_from_proto,
    receive_report_to_proto,
)
from services.rollout.weight_protocol import WeightProtocol


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """Answers the coordinator's calls for one worker.

    Args:
        weights: the state machine in front of the engine.
        status: returns what the worker is doing now.
    """

    def __init__(self, weights: WeightProtocol, status: Callable[[], RolloutStatus]) -> None:
        self._weights = weights
        self._plans = PlanMemory()
        self._status = status

    def as_services(self) -> dict[str, Service]:
        """Return the services for `rollmesh.rpc.server.Server`."""
        return {"rollmesh.v1.RolloutService": (rollout_pb2_grpc.add_RolloutServiceServicer_to_server, self)}

    async def PrepareWeights(
        self, request: rollout_pb2.PrepareWeightsRequest, context: Any
    ) -> rollout_pb2.PrepareWeightsResponse:
        call = prepare_from_proto(request)
        plan = self._plans.find(call.plan, call.plan_digest)
        if plan is None:
            return prepare_answer_to_proto(needs_plan=True)
        await self._weights.prepare(call.version, plan, call.epoch, call.rank, call.transfer_deadline_s)
        return prepare_answer_to_proto(needs_plan=False)

    async def ReceiveWeights(
        self, request: rollout_pb2.ReceiveWeightsRequest, context: Any
    ) -> rollout_pb2.ReceiveWeightsResponse:
        return receive_report_to_proto(await self._weights.receive(receive_from_proto(request)))

    async def CommitWeights(
        self, request: rollout_pb2.CommitWeightsRequest, context: Any
    ) -> rollout_pb2.CommitWeightsResponse:
        return commit_report_to_proto(await self._weights.commit(commit_from_proto(request)))

    async def AbortWeights(
        self, request: rollout_pb2.AbortWeightsRequest, context: Any
    ) -> rollout_pb2.AbortWeightsResponse:
        call = abort_from_proto(request)
        await self._weights.abort(call.version, call.reason)
        return rollout_pb2.AbortWeightsResponse()

    async def GetRolloutStatus(
        self, request: rollout_pb2.GetRolloutStatusRequest, context: Any
    ) -> rollout_pb2.GetRolloutStatusResponse:
        return rollout_status_to_proto(self._status())
