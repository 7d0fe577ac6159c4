"""A rollout worker's half of the weight protocol with answers that the test chooses: a gRPC servicer, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollmesh.errors import RollMeshError, WeightTransferError
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, RolloutStatus, WeightEpoch, WeightPlan
from rollmesh.v1 import rollout_pb2, rollout_pb2_grpc
from rollmesh.weights.plan import PlanMemory
from rollmesh.wire import status, weights


@dataclass
class FakeRollout(rollout_pb2_grpc.RolloutServiceServicer):
    """A worker that serves the last committed version, and records every call.

    Attributes:
        digest: the digest in the report of a received transfer.
        num_ranks: the number of digests in that report.
        failures: the error that each step ("prepare", "receive", "commit") raises.
        gates: the event that each step waits for first. With an event that is never set, the worker hangs.
        version: the version that the worker serves.
        calls: the (step, version) of each call, in order.
        epochs: the weight epoch of each prepare call with a known plan.
        ranks: the rank of each prepare call with a known plan.
        plans: the plan of each prepare call; None where the call named the plan by its digest.
    """

    digest: bytes = b"\x11" * 32
    num_ranks: int = 1
    failures: Mapping[str, RollMeshError] = field(default_factory=dict)
    gates: Mapping[str, asyncio.Event] = field(default_factory=dict)
    version: PolicyVersion | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    epochs: list[WeightEpoch] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    plans: list[WeightPlan | None] = field(default_factory=list)
    _plans: PlanMemory = field(default_factory=PlanMemory)
    _aborted: asyncio.Event = field(default_factory=asyncio.Event)

    def steps(self) -> list[str]:
        """Return the steps of the calls, in order."""
        return [step for step, _ in self.calls]

    def forget_plan(self) -> None:
        """Forget the last plan, as a worker that was started again at the same address does."""
        self._plans = PlanMemory()

    async def PrepareWeights(self, request: Any, context: Any) -> rollout_pb2.PrepareWeightsResponse:
        call = weights.prepare_from_proto(request)
        self.plans.append(call.plan)
        if self._plans.find(call.plan, call.plan_digest) is None:
            return rollout_pb2.PrepareWeightsResponse(needs_plan=True)
        self.epochs.append(call.epoch)
        self.ranks.append(call.rank)
        self._aborted.clear()
        await self._step("prepare", call.version)
        return rollout_pb2.PrepareWeightsResponse()

    async def ReceiveWeights(self, request: Any, context: Any) -> rollout_pb2.ReceiveWeightsResponse:
        await self._step("receive", weights.receive_from_proto(request))
        return weights.receive_report_to_proto(ReceiveReport((self.digest,) * self.num_ranks, 1024, 0.01))

    async def CommitWeights(self, request: Any, context: Any) -> rollout_pb2.CommitWeightsResponse:
        version = weights.commit_from_proto(request)
        await self._step("commit", version)
        self.version = version
        return weights.commit_report_to_proto(CommitReport(0.02, 0.01))

    async def AbortWeights(self, request: Any, context: Any) -> rollout_pb2.AbortWeightsResponse:
        self.calls.append(("abort", str(weights.abort_from_proto(request).version)))
        self._aborted.set()
        return rollout_pb2.AbortWeightsResponse()

    async def GetRolloutStatus(self, request: Any, context: Any) -> rollout_pb2.GetRolloutStatusResponse:
        return status.rollout_status_to_proto(RolloutStatus(self.version, 0, 0, 0, 0, 0))

    async def _step(self, name: str, version: PolicyVersion) -> None:
        """Wait for the step's gate, and raise the step's error. An abort ends the wait with an error."""
        self.calls.append((name, str(version)))
        if (gate := self.gates.get(name)) is not None:
            waits = [asyncio.ensure_future(gate.wait()), asyncio.ensure_future(self._aborted.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            if not gate.is_set():
                raise WeightTransferError("aborted")
        if (error := self.failures.get(name)) is not None:
            raise error
