"""The learner tells anyone who asks what it is doing."""

from __future__ import annotations

from rollmesh.rpc.learner_client import LearnerClient
from rollmesh.rpc.server import Server
from rollmesh.types import LearnerPhase, PolicyVersion
from rollmesh.v1.learner_pb2_grpc import add_LearnerServiceServicer_to_server
from services.learner.phase import PhaseTracker
from services.learner.servicer import LearnerServicer
from tests.fakes.waiting import run_bounded


def test_the_phase_and_the_last_step_of_the_learner_arrive() -> None:
    async def test() -> None:
        tracker = PhaseTracker(60.0)
        service = (add_LearnerServiceServicer_to_server, LearnerServicer(tracker))
        services = {"rollmesh.v1.LearnerService": service}
        async with Server("127.0.0.1:0", services, grace_s=0.0) as server, LearnerClient(server.address) as client:
            assert (await client.status()).phase is LearnerPhase.STARTING
            tracker.trained(3, PolicyVersion(0, 3))
            tracker.enter(LearnerPhase.PUBLISHING)
            status = await client.status()
        assert (status.phase, status.num_steps, status.version) == (LearnerPhase.PUBLISHING, 3, PolicyVersion(0, 3))

    run_bounded(test())
