"""Asks the learner what it is doing."""

from __future__ import annotations

from rollmesh.rpc.channel import Connection
from rollmesh.rpc.status_codes import translate_errors
from rollmesh.types import LearnerStatus
from rollmesh.v1 import learner_pb2, learner_pb2_grpc
from rollmesh.wire.status import learner_status_from_proto


class LearnerClient(Connection):
    """A connection to the learner. Belongs to the running event loop; `close` it when done.

    Args:
        address: the "host:port" that the learner registered.
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"learner at {address}", address, "learner.address")
        self._stub = learner_pb2_grpc.LearnerServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def status(self, *, timeout_s: float = 5.0) -> LearnerStatus:
        """Return the learner's phase and progress. The call is one try.

        Raises:
            UnavailableError: the learner cannot be reached.
            DeadlineError: the learner does not answer in time.
        """
        request = learner_pb2.GetLearnerStatusRequest()
        with translate_errors(self.peer):
            return learner_status_from_proto(await self._stub.GetLearnerStatus(request, timeout=timeout_s))
