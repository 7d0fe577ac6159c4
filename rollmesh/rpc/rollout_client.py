"""Calls a rollout worker for the coordinator: the steps of the weight protocol.

Each call is one try. The coordinator decides whether to ask a worker again, to leave the worker out or to abort,
because the coordinator knows which workers are still members.
"""

from __future__ import annotations

from typing import Any

from rollmesh.rpc.channel import Connection
from rollmesh.rpc.status_codes import translate_errors
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, RolloutStatus, WeightEpoch
from rollmesh.v1 import rollout_pb2, rollout_pb2_grpc
from rollmesh.wire import status, weights


class RolloutClient(Connection):
    """A connection to one worker. Belongs to the running event loop; `close` it when done.

    All methods raise `UnavailableError` where the worker cannot be reached, and `DeadlineError` where the worker does
    not answer in time.

    Args:
        address: the "host:port" that the worker registered.
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"rollout worker at {address}", address, "rollout.address")
        self._stub = rollout_pb2_grpc.RolloutServiceStub(self._channel)  # type: ignore[no-untyped-call]
        # Like the stub's method, but takes bytes: see `rollmesh.wire.weights.prepare_to_bytes`.
        self._prepare = self._channel.unary_unary(
            "/rollmesh.v1.RolloutService/PrepareWeights",
            response_deserializer=rollout_pb2.PrepareWeightsResponse.FromString,
        )
        self._known_plan = b""

    async def prepare(
        self,
        version: PolicyVersion,
        plan: weights.EncodedPlan,
        epoch: WeightEpoch,
        rank: int,
        transfer_deadline_s: float,
        *,
        timeout_s: float,
    ) -> None:
        """PREPARE a version. Return when the worker has begun to join the epoch with its processes from ``rank`` on.

        The client sends the plan if the worker has not got the plan before, or asks for the plan again.

        Raises:
            InvalidArgumentError: the plan does not fit the worker's model.
        """
        call = weights.PrepareWeightsCall(version, None, epoch, rank, transfer_deadline_s, plan.digest)
        if plan.digest == self._known_plan:
            answer = await self._call(self._stub.PrepareWeights, weights.prepare_to_proto(call), timeout_s)
            if not weights.prepare_answer_from_proto(answer):
                return
        await self._call(self._prepare, weights.prepare_to_bytes(call, plan), timeout_s)
        self._known_plan = plan.digest

    async def receive(self, version: PolicyVersion, *, timeout_s: float) -> ReceiveReport:
        """TRANSFER: wait until the worker has received all bytes.

        Raises:
            SupersededError: another version is in preparation.
            WeightTransferError: the transfer failed.
        """
        answer = await self._call(self._stub.ReceiveWeights, weights.receive_to_proto(version), timeout_s)
        return weights.receive_report_from_proto(answer)

    async def commit(self, version: PolicyVersion, *, timeout_s: float) -> CommitReport:
        """COMMIT: wait until the version serves.

        Raises:
            SupersededError: another version is in preparation.
            TaintedError: the load failed midway; the worker is tainted.
            WeightTransferError: the version was not received; the old version serves.
        """
        answer = await self._call(self._stub.CommitWeights, weights.commit_to_proto(version), timeout_s)
        return weights.commit_report_from_proto(answer)

    async def abort(self, version: PolicyVersion, reason: str, *, timeout_s: float = 10.0) -> None:
        """ABORT a version. The old version serves on."""
        call = weights.AbortWeightsCall(version, reason)
        await self._call(self._stub.AbortWeights, weights.abort_to_proto(call), timeout_s)

    async def status(self, *, timeout_s: float = 5.0) -> RolloutStatus:
        """Return what the worker is doing."""
        answer = await self._call(self._stub.GetRolloutStatus, rollout_pb2.GetRolloutStatusRequest(), timeout_s)
        return status.rollout_status_from_proto(answer)

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        with translate_errors(self.peer):
            return await method(request, timeout=timeout_s)
