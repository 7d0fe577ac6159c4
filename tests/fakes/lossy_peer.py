"""A rollout worker behind a connection that loses calls: the real weight protocol, a fake engine, no sockets."""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from rollmesh.errors import DeadlineError, UnavailableError
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, WeightEpoch
from rollmesh.v1 import rollout_pb2
from rollmesh.wire.weights import EncodedPlan, plan_from_proto
from services.rollout.weight_protocol import WeightProtocol
from tests.fakes.engine import FakeEngine

AnswerT = TypeVar("AnswerT")


class Loss(enum.Enum):
    """The fate of one call."""

    NONE = "it is answered"
    REQUEST = "the connection breaks before the request arrives"
    ANSWER = "the request is executed and the connection breaks before the answer arrives"
    SILENCE = "the request never arrives and nobody notices before the deadline"


def _nothing_is_lost(step: str, call: int) -> Loss:
    return Loss.NONE


@dataclass
class LossyPeer:
    """A peer with the methods of a `rollmesh.rpc.rollout_client.RolloutClient`, some of whose calls are lost.

    Attributes:
        engine: the engine behind the weight protocol.
        loss: gives the fate of a call, from its step ("prepare", "receive", "commit", "abort") and its number. The
            first call of a step has the number 1.
        retry_after_s: the pause that a lost connection asks for, in seconds.
        num_calls: the number of calls, by step.
        called_s: the loop times of the calls, by step.
    """

    engine: FakeEngine = field(default_factory=lambda: FakeEngine(version=None))
    loss: Callable[[str, int], Loss] = _nothing_is_lost
    retry_after_s: float = 0.0
    num_calls: Counter[str] = field(default_factory=Counter)
    called_s: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.protocol = WeightProtocol(self.engine)

    async def prepare(
        self,
        version: PolicyVersion,
        plan: EncodedPlan,
        epoch: WeightEpoch,
        rank: int,
        transfer_deadline_s: float,
        *,
        timeout_s: float,
    ) -> None:
        decoded = plan_from_proto(rollout_pb2.WeightPlan.FromString(plan.data))
        await self._call(
            "prepare", lambda: self.protocol.prepare(version, decoded, epoch, rank, transfer_deadline_s), timeout_s
        )

    async def receive(self, version: PolicyVersion, *, timeout_s: float) -> ReceiveReport:
        return await self._call("receive", lambda: self.protocol.receive(version), timeout_s)

    async def commit(self, version: PolicyVersion, *, timeout_s: float) -> CommitReport:
        return await self._call("commit", lambda: self.protocol.commit(version), timeout_s)

    async def abort(self, version: PolicyVersion, reason: str, *, timeout_s: float) -> None:
        await self._call("abort", lambda: self.protocol.abort(version, reason), timeout_s)

    async def close(self) -> None:
        """Do nothing: there is no connection to close."""

    async def _call(self, step: str, execute: Callable[[], Awaitable[AnswerT]], timeout_s: float) -> AnswerT:
        self.num_calls[step] += 1
        self.called_s.setdefault(step, []).append(asyncio.get_running_loop().time())
        loss = self.loss(step, self.num_calls[step])
        if loss is Loss.REQUEST:
            raise UnavailableError("connection refused", self.retry_after_s)
        try:
            async with asyncio.timeout(timeout_s):
                if loss is Loss.SILENCE:
                    await asyncio.get_running_loop().create_future()
                answer = await execute()
        except TimeoutError as error:
            raise DeadlineError(f"no answer to {step} in {timeout_s:g} s") from error
        if loss is Loss.ANSWER:
            raise UnavailableError("connection reset", self.retry_after_s)
        return answer
