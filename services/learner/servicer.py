"""The learner's own gRPC service: what it is doing."""

from __future__ import annotations

from typing import Any

from rollmesh.v1 import learner_pb2, learner_pb2_grpc
from rollmesh.wire.status import learner_status_to_proto
from services.learner.phase import PhaseTracker


class LearnerServicer(learner_pb2_grpc.LearnerServiceServicer):
    """Answers from the loop's progress.

    Args:
        tracker: shared with the step loop.
    """

    def __init__(self, tracker: PhaseTracker) -> None:
        self._tracker = tracker

    async def GetLearnerStatus(
        self, request: learner_pb2.GetLearnerStatusRequest, context: Any
    ) -> learner_pb2.GetLearnerStatusResponse:
        return learner_status_to_proto(self._tracker.status())
