"""Groups through Redis, from one process to another, against `ray.util.queue` with the same arrays.

::

    this process: Ledger.commit, 16 at a time ──► Redis ──► second process: take, read, mark trained, retire

Both begin and end with arrays in memory. The first process runs on the event loop of the services. Our side also moves
the group's row through the ledger: fencing, order, the states up to retired. Ray's queue keeps no account of anything.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop

from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.codec import encode_group
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.types import Group, PromptId
from tests.bench.figures import Figure, median
from tests.bench.payloads import NUM_SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS, make_group
from tests.bench.peer import Peer, say

NUM_GROUPS = 320
"""In one measurement of ours; a quarter of it for Ray. Fewer would measure how a round begins and ends."""
BATCH = 16
CONCURRENT_COMMITS = 16
SHAPE = (NUM_SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS)
RAY_SCRIPT = Path(__file__).with_name("ray_queue.py")


def run(quick: bool) -> list[Figure]:
    """Groups per second, in turns with Ray."""
    num_pairs = 3 if quick else 7
    title = "groups/s through the Redis ledger and queue / through ray.util.queue put and get"
    python = find_ray()
    folder = Path(tempfile.mkdtemp(prefix="bench-redis-"))
    try:
        with (
            EmbeddedRedis.start(folder) as server,
            Peer(["-m", "tests.bench.redis_queue", server.url]) as consumer,
        ):
            bench = _Queue(server.url, consumer, NUM_GROUPS)
            payload_bytes = bench.payload_bytes
            bench.groups_per_s()  # warms up both processes
            if python is None:
                ours = [bench.groups_per_s() for _ in range(num_pairs)]
                details = {"redis_groups_per_s": median(ours), "payload_bytes": payload_bytes}
                reason = "ray is not installed: pip install 'rollmesh[ray]', or name a Python that has it"
                return [Figure("redis_queue", title, 12.0, "at least", [], details, reason)]
            with Peer([str(RAY_SCRIPT), *map(str, SHAPE)], python) as ray:
                ray.answer(120.0)
                ray.ask(num_groups=NUM_GROUPS // 4)
                pairs = []
                for _ in range(num_pairs):
                    theirs = float(ray.ask(num_groups=NUM_GROUPS // 4)["groups_per_s"])
                    pairs.append((theirs, bench.groups_per_s()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    details = {
        "redis_groups_per_s": median([ours for _, ours in pairs]),
        "ray_groups_per_s": median([theirs for theirs, _ in pairs]),
        "payload_bytes": payload_bytes,
        "groups_per_batch": BATCH,
    }
    ratios = [ours / theirs for theirs, ours in pairs]
    return [Figure("redis_queue", title, 12.0, "at least", ratios, details)]


def find_ray() -> str | None:
    """A Python interpreter that has Ray: the one named by RAY_PYTHON, else this one, if it does."""
    python = os.environ.get("RAY_PYTHON") or sys.executable
    probe = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)"]
    found = subprocess.run(probe, check=False, timeout=30)
    return python if found.returncode == 0 else None


class _Queue:
    """This process's end: the rollout worker's and, before the clock runs, the coordinator's."""

    def __init__(self, url: str, consumer: Peer, num_groups: int) -> None:
        self._url = url
        self._consumer = consumer
        generator = np.random.default_rng(0)
        self._groups = [make_group(PromptId("train", 0, i), i, generator) for i in range(num_groups)]
        self._round = 0
        self.payload_bytes = len(encode_group(self._groups[0]))

    def groups_per_s(self) -> float:
        """From the first commit to the last group that was unpacked on the other side."""
        self._round += 1
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._measure(f"bench-{self._round}"))

    async def _measure(self, run_id: str) -> float:
        redis = connect(self._url, 5.0)
        try:
            ledger = CoordinatorLedger(redis, run_id, term=0)
            await ledger.open_groups([group.prompt_id for group in self._groups])
            rows = await ledger.lease("rollout-0", 300.0, len(self._groups))
            tokens = {row.group_id: row.fencing_token for row in rows}
            await asyncio.to_thread(self._consumer.ask, run_id=run_id, num_groups=len(self._groups))
            room = asyncio.Semaphore(CONCURRENT_COMMITS)

            async def commit(group: Group) -> None:
                async with room:
                    outcome = await ledger.commit(group, tokens[group.group_id])
                assert outcome is CommitOutcome.ACCEPTED, outcome

            started = time.perf_counter()
            await asyncio.gather(*(commit(group) for group in self._groups))
            await asyncio.to_thread(self._consumer.answer)
            return len(self._groups) / (time.perf_counter() - started)
        finally:
            await redis.aclose()


def consume(url: str) -> None:
    """The second process: for each line that names a run, say that it waits, take all groups, and say so."""
    import json

    redis = connect_blocking(url, 5.0)
    for line in sys.stdin:
        question = json.loads(line)
        queue = BatchQueue(redis, question["run_id"])
        say(is_ready=True)
        num_groups = question["num_groups"]
        for step in range(1, num_groups // BATCH + 1):
            batch = queue.take_batch(step, BATCH, BATCH + 1, 30.0)
            assert batch is not None
            groups = queue.payloads([row.group_id for row in batch.rows])
            assert len(groups) == BATCH
            queue.mark_trained(step)
            queue.retire(step)
        say(num_groups=num_groups)


if __name__ == "__main__":
    consume(sys.argv[1])
