"""What Redis holds in the course of a long run: a real ledger and a real server, engines that only pretend.

::

    python -m tests.bench.redis_memory [groups]      # 100,000 by default, a few minutes

    open ─► lease ─► commit 95, filter 3, fail 2 of 100 ─► take 64 ─► train ─► release ─► every 10 steps: retire

The payloads are small, because they go when groups retire and say nothing about the length of a run. Memory is read
when everything that can retire has retired. Exits with 1 where it grew by more than `ALLOWED_GROWTH`.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollmesh.replay.accounting import account
from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.rows import GroupRow
from rollmesh.types import Group, PolicyVersion, PromptId, Sample, Score, StopReason, Turn, VersionSpan

BATCH, SLOTS = 64, 128
STEPS_PER_CHECKPOINT = 10
NUM_TOKENS = 16
ALLOWED_GROWTH = 1.2
"""From a tenth of the run to its end. The server's own buffers make readings differ by a tenth; a run that kept 1 KB a
group would grow fiftyfold."""
RUN_ID = "memory"


@dataclass(frozen=True, slots=True)
class Reading:
    """Redis when ``num_groups`` groups had been opened: ``used_bytes`` in all its keys, which are ``num_keys``."""

    num_groups: int
    used_bytes: int
    num_keys: int


class SimulatedRun:
    """Coordinator, workers and learner in one coroutine, on a real ledger."""

    def __init__(self, url: str, num_groups: int) -> None:
        self._chance = random.Random(0)
        self._num_groups = num_groups
        self._url = url
        self._step = 0
        self._blocking = connect_blocking(url, 30.0)
        self._queue = BatchQueue(self._blocking, RUN_ID)

    async def readings(self, every: int) -> AsyncIterator[Reading]:
        """Run, and read the memory about every so many groups and at the end.

        Raises:
            AssertionError: the accounting at the end is not balanced.
        """
        redis = connect(self._url, 30.0)
        try:
            ledger, next_reading = CoordinatorLedger(redis, RUN_ID, max_attempts=1, term=0), every
            while not (await ledger.snapshot()).is_closed:
                await self._fill_slots(ledger)
                await self._train(ledger)
                num_opened = (await ledger.snapshot()).num_opened
                if num_opened >= min(next_reading, self._num_groups):
                    next_reading += every
                    yield self._read(num_opened)
            books = await account(ledger)
            assert books["is_balanced"], books
            assert books["num_opened"] == self._num_groups, books
        finally:
            await redis.aclose()
            self._blocking.close()

    async def _fill_slots(self, ledger: CoordinatorLedger) -> None:
        """Open, lease and end groups until every slot holds a group that is ready, or no prompt is left."""
        while (snapshot := await ledger.snapshot()).num_slots_used < SLOTS:
            first = snapshot.num_opened
            count = min(SLOTS - snapshot.num_slots_used, self._num_groups - first)
            if count == 0:
                await ledger.close()
                return
            prompts = [PromptId("train", 0, index) for index in range(first, first + count)]
            await ledger.open_groups(prompts, SLOTS, first)
            rows = await ledger.lease("rollout-0", 600.0, count)
            await asyncio.gather(*(self._end(ledger, row) for row in rows))

    async def _end(self, ledger: CoordinatorLedger, row: GroupRow) -> None:
        chance = self._chance.random()
        if chance < 0.02:
            reason = f"the reward server gave no answer in {chance:.6f} s"
            await ledger.give_back(row.group_id, row.fencing_token, reason)
        elif chance < 0.05:
            reason = f"all 2 scores are {chance:.6f}"
            await ledger.filter_group(row.group_id, row.fencing_token, reason)
        else:
            await ledger.commit(make_group(row, self._step), row.fencing_token)

    async def _train(self, ledger: CoordinatorLedger) -> None:
        """All batches that are there; their versions are committed, and a checkpoint covers every tenth."""
        is_closed = (await ledger.snapshot()).is_closed
        for _ in range(3 * SLOTS // BATCH if is_closed else 1):
            batch = self._queue.take_batch(self._step + 1, BATCH, BATCH + 1, 10.0)
            if batch is None:
                break
            self._step += 1
            self._queue.payloads([row.group_id for row in batch.rows])
            self._queue.mark_trained(self._step)
            await ledger.release_slots(self._step)
            if self._step % STEPS_PER_CHECKPOINT == 0 or batch.is_last:
                self._queue.retire(self._step)

    def _read(self, num_groups: int) -> Reading:
        self._queue.retire(self._step)
        return Reading(num_groups, int(self._blocking.info("memory")["used_memory_dataset"]), self._blocking.dbsize())


def make_group(row: GroupRow, version: int) -> Group:
    """One sample of a few tokens."""
    sample = Sample(
        sample_id=f"{row.group_id}/0",
        index=0,
        prompt_id=row.prompt_id,
        prompt_token_ids=np.arange(3, dtype=np.int32),
        response_token_ids=np.arange(NUM_TOKENS, dtype=np.int32),
        turns=(Turn(NUM_TOKENS, 0, StopReason.STOP),),
        behaviour_logprobs=np.zeros(NUM_TOKENS, dtype=np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, version), 0, NUM_TOKENS),),
        score=Score(reward=1.0, score=1.0),
    )
    return Group(row.group_id, row.prompt_id, row.sequence, row.attempt, (sample,))


def growth(readings: list[Reading]) -> float:
    """The largest reading over the first one."""
    return max(reading.used_bytes for reading in readings) / readings[0].used_bytes


async def _print(url: str, num_groups: int) -> list[Reading]:
    started = time.perf_counter()
    readings = []
    print(f"{'groups':>9} {'bytes in Redis':>15} {'keys':>7} {'groups/s':>9}")
    async for reading in SimulatedRun(url, num_groups).readings(every=max(1, num_groups // 10)):
        rate = reading.num_groups / (time.perf_counter() - started)
        print(f"{reading.num_groups:>9,} {reading.used_bytes:>15,} {reading.num_keys:>7,} {rate:>9,.0f}", flush=True)
        readings.append(reading)
    return readings


def main(arguments: list[str]) -> int:
    num_groups = int(arguments[0]) if arguments else 100_000
    folder = Path(tempfile.mkdtemp(prefix="bench-memory-"))
    try:
        with EmbeddedRedis.start(folder) as server:
            readings = asyncio.run(_print(server.url, num_groups))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    grown = growth(readings)
    print(f"largest over first reading: {grown:.4f} (at most {ALLOWED_GROWTH})")
    return 0 if grown <= ALLOWED_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
