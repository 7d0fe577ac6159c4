"""An engine that sleeps instead of generating; the test chooses its answers and delays.

vLLM takes half a minute to start, and a test cannot choose the sample with which vLLM is slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rollmesh.types import (
    CommitReport,
    PolicyVersion,
    ReceiveReport,
    SamplingSpec,
    StopReason,
    VersionSpan,
    WeightEpoch,
    WeightPlan,
)
from services.rollout.completion import Completion


@dataclass
class Request:
    """One call of `FakeEngine.generate`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec
    seed: int


def _five_tokens(request: Request) -> int:
    return 5


def _at_once(request: Request) -> float:
    return 0.0


def _not_held(request: Request) -> bool:
    return False


@dataclass
class FakeEngine:
    """An engine that generates ``num_tokens(request)`` times the token 65 after ``delay_s(request)`` seconds.

    If ``is_held(request)`` is true, the request does not end before ``released`` is set.

    ``steps`` records the calls of the weight protocol. Before a step, the engine waits for the step's event in
    ``gates``, and then raises the step's error in ``failures``.
    """

    num_tokens: Callable[[Request], int] = _five_tokens
    delay_s: Callable[[Request], float] = _at_once
    is_held: Callable[[Request], bool] = _not_held
    released: asyncio.Event = field(default_factory=asyncio.Event)
    stop_reason: StopReason = StopReason.STOP
    version: PolicyVersion | None = field(default_factory=lambda: PolicyVersion(0, 0))
    num_weight_ranks: int = 1
    is_alive: bool = True
    failures: dict[str, Exception] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    num_generated_tokens: int = 0
    num_running: int = 0
    max_running: int = 0

    def explain_death(self) -> str:
        return "vLLM has died: OSError: a cause"

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec, seed: int
    ) -> Completion:
        request = Request(request_id, prompt_token_ids, sampling, seed)
        self.requests.append(request)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await asyncio.sleep(self.delay_s(request))
            if self.is_held(request):
                await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        finally:
            self.num_running -= 1
        if "generate" in self.failures:
            raise self.failures["generate"]
        length = self.num_tokens(request)
        self.num_generated_tokens += length
        version = self.version or PolicyVersion(0, 0)
        return Completion(
            token_ids=np.full(length, 65, np.int32),
            logprobs=np.full(length, -0.5, np.float32),
            version_spans=(VersionSpan(version, 0, length),) if length else (),
            stop_reason=self.stop_reason,
        )

    async def prepare(self, plan: WeightPlan, epoch: WeightEpoch, rank: int, deadline_s: float) -> None:
        await self._step("prepare")

    async def receive(self, version: PolicyVersion) -> ReceiveReport:
        await self._step("receive")
        return ReceiveReport((b"d" * 32,), 1024, 0.01)

    async def commit(self, version: PolicyVersion) -> CommitReport:
        await self._step("commit")
        self.version = version
        return CommitReport(0.02, 0.01)

    async def abort(self) -> None:
        await self._step("abort")

    async def stop(self) -> None:
        await self._step("stop")

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.failures:
            raise self.failures[name]
