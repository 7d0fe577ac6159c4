"""The line in front of the model, with a forward pass that the test holds in its hands."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rollmesh.aio.supervisor import Supervisor
from rollmesh.errors import UnavailableError
from rollmesh.types import Float32Array, RetryableFailure
from services.reference.model import LogProbJob
from services.reference.scheduler import Scheduler
from tests.fakes.waiting import until


class Forward:
    """Records the batches; answers each job with its own token ids. Blocks until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.error: Exception | None = None

    def __call__(self, jobs: Sequence[LogProbJob]) -> list[Float32Array]:
        assert self.go.wait(60)
        self.batches.append([job.num_tokens for job in jobs])
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        return [job.token_ids[job.num_prompt_tokens :].astype(np.float32) for job in jobs]


def job(num_tokens: int, first: int = 0) -> LogProbJob:
    return LogProbJob(np.arange(first, first + num_tokens, dtype=np.int32), 1, 1.0)


def with_scheduler(
    body: Callable[[Scheduler, Forward], Awaitable[None]], tokens_per_batch: int = 100, max_waiting_tokens: int = 1000
) -> None:
    async def run() -> None:
        forward = Forward()
        with ThreadPoolExecutor(1) as executor:
            scheduler = Scheduler(forward, executor, tokens_per_batch, max_waiting_tokens)
            async with asyncio.timeout(60), Supervisor() as supervisor:
                supervisor.spawn(scheduler.run(), "scheduler")
                try:
                    await body(scheduler, forward)
                finally:
                    forward.go.set()

    asyncio.run(run())


def test_each_job_gets_its_own_answer_whatever_it_was_batched_with() -> None:
    async def body(scheduler: Scheduler, forward: Forward) -> None:
        jobs = [job(2 + number % 17, first=number) for number in range(200)]
        futures = [await scheduler.submit(each) for each in jobs]
        for each, outcome in zip(jobs, await asyncio.gather(*futures), strict=True):
            assert isinstance(outcome, np.ndarray)
            np.testing.assert_array_equal(outcome, each.token_ids[1:])
        assert len(forward.batches) < 100
        assert all(max(batch) * len(batch) <= 100 for batch in forward.batches)
        assert threading.get_ident() not in forward.threads

    with_scheduler(body, max_waiting_tokens=10_000)


def test_the_event_loop_goes_on_during_a_forward_pass() -> None:
    async def body(scheduler: Scheduler, forward: Forward) -> None:
        forward.go.clear()
        future = await scheduler.submit(job(5))
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not future.done()
        forward.go.set()
        await future

    with_scheduler(body)


def test_submission_waits_while_the_line_is_full() -> None:
    async def body(scheduler: Scheduler, forward: Forward) -> None:
        forward.go.clear()
        first = await scheduler.submit(job(10))
        await until(lambda: scheduler.num_waiting_tokens == 0)  # taken by the pass that is under way
        waiting = [await scheduler.submit(job(10)) for _ in range(3)]
        assert scheduler.num_waiting_tokens == 30
        late = asyncio.ensure_future(scheduler.submit(job(10)))
        await asyncio.sleep(0.02)
        assert not late.done()
        forward.go.set()
        await asyncio.gather(first, *waiting, await late)

    with_scheduler(body, max_waiting_tokens=30)


def test_a_cancelled_job_is_not_computed_and_frees_its_room() -> None:
    async def body(scheduler: Scheduler, forward: Forward) -> None:
        forward.go.clear()
        first = await scheduler.submit(job(3))
        await until(lambda: scheduler.num_waiting_tokens == 0)
        gone = await scheduler.submit(job(7))
        stays = await scheduler.submit(job(9))
        gone.cancel()
        forward.go.set()
        await asyncio.gather(first, stays)
        assert forward.batches == [[3], [9]]
        assert scheduler.num_waiting_tokens == 0

    with_scheduler(body)


def test_a_pass_that_may_succeed_later_is_a_retryable_failure_and_the_line_goes_on() -> None:
    async def body(scheduler: Scheduler, forward: Forward) -> None:
        forward.error = UnavailableError("out of memory", 1.5)
        assert await (await scheduler.submit(job(3))) == RetryableFailure("out of memory", 1.5)
        forward.error = None
        assert isinstance(await (await scheduler.submit(job(3))), np.ndarray)

    with_scheduler(body)
