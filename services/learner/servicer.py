"""The learner's gRPC service, which reports the learner's phase and progress."""

from __future__ import annotations

from typing import Any

from rollmesh.v1 import learner_pb2, learner_pb2_grpc
from rollmesh.wire.status import learner_status_to_proto
from services.learner.phase import PhaseTracker


class LearnerServicer(learner_pb2_grpc.LearnerServiceServicer):
    """The learner's gRPC handlers.

    Args:
        tracker: the phase and the progress; the step loop writes the same tracker.
    """

    def __init__(self, tracker: PhaseTracker) -> None:
        self._tracker = tracker

    async def GetLearnerStatus(
        self, request: learner_pb2.GetLearnerStatusRequest, context: Any
    ) -> learner_pb2.GetLearnerStatusResponse:
        return learner_status_to_proto(self._tracker.status())
