"""The learner's own gRPC service: what it is doing."""

from __future__ import annotations

from typing import Any

from rollmesh.v1 import learner_pb2, learner_pb2_grpc
from rollmesh.wire.status import learner_status_to_proto
from services.learner.progress import LearnerProgress


class LearnerServicer(learner_pb2_grpc.LearnerServiceServicer):
    """Answers from the loop's progress.

    Args:
        progress: shared with the step loop.
    """

    def __init__(self, progress: LearnerProgress) -> None:
        self._progress = progress

    async def GetLearnerStatus(
        self, request: learner_pb2.GetLearnerStatusRequest, context: Any
    ) -> learner_pb2.GetLearnerStatusResponse:
        return learner_status_to_proto(self._progress.status())
