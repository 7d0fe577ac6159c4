"""The worker's service keeps a plan from one version to the next, and asks for a plan that it does not hold."""

from __future__ import annotations

import asyncio

from rollmesh.types import PolicyVersion, RolloutStatus, TensorSpec, WeightEpoch
from rollmesh.v1 import rollout_pb2
from rollmesh.weights.plan import build_plan
from rollmesh.wire.weights import PrepareWeightsCall, prepare_to_proto
from services.rollout.servicer import RolloutServicer
from services.rollout.weight_protocol import WeightProtocol
from tests.fakes.engine import FakeEngine

PLAN = build_plan([TensorSpec("w", "float32", (2,))], 100)
EPOCH = WeightEpoch(1, "127.0.0.1", 1234, 2)


def request(number: int, *, with_plan: bool) -> rollout_pb2.PrepareWeightsRequest:
    version = PolicyVersion(0, number)
    return prepare_to_proto(PrepareWeightsCall(version, PLAN if with_plan else None, EPOCH, 1, 10.0, PLAN.digest))


def test_a_plan_that_is_not_held_is_asked_for_before_anything_is_prepared() -> None:
    async def scenario() -> None:
        engine = FakeEngine(version=None)
        protocol = WeightProtocol(engine)
        servicer = RolloutServicer(protocol, lambda: RolloutStatus(None, 0, 0, 0, 0, 0))
        assert (await servicer.PrepareWeights(request(1, with_plan=False), None)).needs_plan
        assert engine.steps == []
        for number, with_plan in ((1, True), (2, False)):
            assert not (await servicer.PrepareWeights(request(number, with_plan=with_plan), None)).needs_plan
        assert engine.steps == ["prepare", "abort", "prepare"]
        await protocol.close()

    asyncio.run(scenario())
