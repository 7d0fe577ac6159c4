"""Gathers the requests of all streams into forward passes.

::

    submit() ──► waiting, oldest first ──► run(): next_batch ──► forward in the model's thread ──► the requests' futures

* `submit` waits while ``max_waiting_tokens`` tokens wait. Then the servicer does not read its stream. `run` makes room.
* `run` waits for requests, then for the forward pass. The event loop never computes, so heartbeats go on.
* `run` leaves out a request whose future was cancelled because the stream broke.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from rollmesh.errors import UnavailableError
from rollmesh.types import Float32Array, InvalidSample, RetryableFailure
from services.reference.batching import next_batch
from services.reference.model import LogProbJob

Compute = Callable[[Sequence[LogProbJob]], list[Float32Array]]

Outcome = Float32Array | RetryableFailure | InvalidSample


@dataclass(frozen=True, slots=True)
class _QueuedJob:
    job: LogProbJob
    outcome: asyncio.Future[Outcome]


class Scheduler:
    """The line of requests in front of one model.

    Args:
        compute: runs the forward pass. Blocks; raises `UnavailableError` where the same request may succeed later.
        executor: runs ``compute``; has one thread.
        tokens_per_batch: the most tokens of one pass, padding included; no job may be longer.
        max_waiting_tokens: the number of waiting tokens at which `submit` begins to wait.
    """

    def __init__(self, compute: Compute, executor: Executor, tokens_per_batch: int, max_waiting_tokens: int) -> None:
        self._compute = compute
        self._executor = executor
        self._tokens_per_batch = tokens_per_batch
        self._max_waiting_tokens = max_waiting_tokens
        self._waiting: list[_QueuedJob] = []
        self._num_waiting_tokens = 0
        self._changed = asyncio.Condition()

    @property
    def num_waiting_tokens(self) -> int:
        return self._num_waiting_tokens

    async def submit(self, job: LogProbJob) -> asyncio.Future[Outcome]:
        """Wait for room, put a job in the line, and return the future of its outcome.

        A failed pass is an outcome and not an exception, because an exception would break the job's stream.
        """
        queued = _QueuedJob(job, asyncio.get_running_loop().create_future())
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            self._waiting.append(queued)
            self._num_waiting_tokens += job.num_tokens
            self._changed.notify_all()
        return queued.outcome

    def _has_room(self) -> bool:
        return self._num_waiting_tokens < self._max_waiting_tokens

    async def run(self) -> None:
        """Serve the line until cancelled."""
        while True:
            batch = await self._take()
            if not batch:
                continue
            jobs = [queued.job for queued in batch]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, jobs)
            except UnavailableError as error:
                for queued in batch:
                    _resolve(queued, RetryableFailure(str(error), error.retry_after_s))
                continue
            for queued, logprobs in zip(batch, results, strict=True):
                _resolve(queued, logprobs)

    async def _take(self) -> list[_QueuedJob]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._waiting))
            self._waiting = [queued for queued in self._waiting if not queued.outcome.done()]
            batch: list[_QueuedJob] = []
            if self._waiting:
                chosen = next_batch([queued.job.num_tokens for queued in self._waiting], self._tokens_per_batch)
                batch = [self._waiting[index] for index in chosen]
                left_out = set(chosen)
                self._waiting = [queued for index, queued in enumerate(self._waiting) if index not in left_out]
            self._num_waiting_tokens = sum(queued.job.num_tokens for queued in self._waiting)
            self._changed.notify_all()
        return batch


def _resolve(queued: _QueuedJob, outcome: Outcome) -> None:
    if not queued.outcome.done():
        queued.outcome.set_result(outcome)
