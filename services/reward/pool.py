"""Runs the reward function in several processes side by side, with one line of waiting samples in front.

::

    submit() ──► line ──► one loop per process: take up to `samples_per_call` ──► call ──► the samples' futures
                              └── a process that was lost is replaced before its loop takes more

* `submit` never waits. The caller of `submit` bounds the number of samples in the line. The future of a sample always
  ends: with the result of a call, or when the sample's own deadline passes.
* A loop waits for the line, then for its process: at most ``timeout_s`` for a call, ``start_timeout_s`` for a start.
* A fault is the answer `RetryableFailure` for all samples of the call. A fault never becomes a reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from rollmesh.errors import ConfigError
from rollmesh.types import RetryableFailure, ScoreOutcome
from services.reward.launch import find_file
from services.reward.process import CallFault, CallResult, ProcessLostError, RewardJob, RewardProcess

_logger = logging.getLogger(__name__)

_GATHER_S = 0.002
"""Time for which a call with room for more samples waits for further samples."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_MAX_KEYS = 1000


@dataclass(frozen=True, slots=True)
class _QueuedSample:
    job: RewardJob
    outcome: asyncio.Future[ScoreOutcome]


class RewardPool:
    """The children and the line. Call ``start``, then ``run`` in a supervised task, then ``close``.

    Args:
        path: the user's file.
        num_processes: the number of children.
        samples_per_call: the most samples of one call.
        timeout_s: time that one call may take.
        start_timeout_s: time that importing the file may take.
    """

    def __init__(
        self, path: Path, *, num_processes: int, samples_per_call: int, timeout_s: float, start_timeout_s: float
    ) -> None:
        self._path = path
        self._num_processes = num_processes
        self._samples_per_call = samples_per_call
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._line: asyncio.Queue[_QueuedSample] = asyncio.Queue()
        self._processes: list[RewardProcess | None] = []
        self._logged: set[str] = set()
        self._fault = ""  # the fault of the last call that ended; empty for none

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the children that are alive and have loaded the file."""
        return tuple(process.pid for process in self._processes if process is not None)

    async def start(self) -> None:
        """Start all children and wait until they have loaded the file.

        Raises:
            ConfigError: the file is at fault; no child is left.
        """
        path = find_file(self._path)
        self._processes = [None] * self._num_processes
        starts = (self._start_one(path, index) for index in range(self._num_processes))
        try:
            results = await asyncio.gather(*starts, return_exceptions=True)
            for error in results:
                if error is not None:
                    raise error
        except BaseException:
            await self.close()
            raise

    async def _start_one(self, path: Path, index: int) -> None:
        self._processes[index] = await RewardProcess.start(path, self._start_timeout_s)

    async def run(self) -> None:
        """Serve the line until cancelled."""
        await asyncio.gather(*(self._serve(index) for index in range(self._num_processes)))

    async def close(self) -> None:
        """End all children. Deadlines end the samples that are still in the line, or their owner cancels them."""
        processes, self._processes = self._processes, []
        await asyncio.gather(*(process.close() for process in processes if process is not None))

    def submit(self, job: RewardJob, deadline_s: float | None = None) -> asyncio.Future[ScoreOutcome]:
        """Put a sample in the line.

        Args:
            job: the sample.
            deadline_s: time after which nobody needs the outcome; None takes twice the timeout of a call.

        Returns:
            The future of the outcome.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[ScoreOutcome] = loop.create_future()
        timer = loop.call_later(limit_s := deadline_s or 2 * self._timeout_s, self._expire, outcome, limit_s)
        outcome.add_done_callback(lambda _: timer.cancel())
        self._line.put_nowait(_QueuedSample(job, outcome))
        return outcome

    def _expire(self, outcome: asyncio.Future[ScoreOutcome], limit_s: float) -> None:
        busy = f"reward processes up: {len(self.pids)} of {self._num_processes}, samples in line: {self._line.qsize()}"
        why = f"the call before it: {self._fault}" if self._fault else busy
        _resolve(outcome, RetryableFailure(f"not scored within {limit_s:g} s ({why})"))

    async def _serve(self, index: int) -> None:
        """Serve the line with one process. Wait for the line, and for the process, whose calls have time limits."""
        while True:
            process = self._processes[index]
            if process is None:
                process = await self._replace(index)
            queued = await self._take()
            jobs = [item.job for item in queued]
            try:
                result = await process.call(jobs, self._timeout_s)
            except ProcessLostError as error:
                self._log_once(f"lost {error}", f"{error}; a new one is started", jobs, "")
                self._processes[index] = None
                self._fail(queued, str(error))
                await process.close()
                continue
            if isinstance(result, CallFault):
                self._log_once(result.key, result.reason, jobs, result.traceback)
                self._fail(queued, result.reason)
            else:
                self._answer(queued, result)

    async def _replace(self, index: int) -> RewardProcess:
        """Start children until one child is up. The other loops serve the line meanwhile."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._start_one(self._path.resolve(), index)
            except (ConfigError, OSError) as error:
                _logger.error("a reward process does not start again, next try in %g s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                process = self._processes[index]
                assert process is not None
                return process

    async def _take(self) -> list[_QueuedSample]:
        """Take the next samples that a caller still waits for: at least one, at most ``samples_per_call``."""
        queued: list[_QueuedSample] = []
        while not queued:
            item = await self._line.get()
            if not item.outcome.done():
                queued.append(item)
        if self._samples_per_call > 1:
            if self._line.qsize() < self._samples_per_call - 1:
                await asyncio.sleep(_GATHER_S)
            with contextlib.suppress(asyncio.QueueEmpty):
                while len(queued) < self._samples_per_call:
                    item = self._line.get_nowait()
                    if not item.outcome.done():
                        queued.append(item)
        return queued

    def _answer(self, queued: list[_QueuedSample], result: CallResult) -> None:
        self._fault = ""
        for item, score in zip(queued, result.scores, strict=True):
            _resolve(item.outcome, score)
        for key, note in result.notes.items():
            self._log_once(f"note {key}", f"left out: {note}", [queued[0].job], "")

    def _fail(self, queued: list[_QueuedSample], reason: str) -> None:
        self._fault = reason
        for item in queued:
            _resolve(item.outcome, RetryableFailure(reason))

    def _log_once(self, key: str, text: str, jobs: list[RewardJob], traceback: str) -> None:
        """Log the first fault of each kind. Every fault also reaches its caller in the answer."""
        if key in self._logged or len(self._logged) >= _MAX_KEYS:
            return
        self._logged.add(key)
        samples = ", ".join(job.sample_id for job in jobs)
        _logger.warning("%s: %s [%s]%s", self.name, text, samples, f"\n{traceback}" if traceback else "")


def _resolve(outcome: asyncio.Future[ScoreOutcome], value: ScoreOutcome) -> None:
    if not outcome.done():
        outcome.set_result(value)
