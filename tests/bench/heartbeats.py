"""What the heartbeats of 1,000 members cost the coordinator.

::

    this process: 1,000 members over 100 connections ──► second process: a coordinator that does nothing else

Measured is the second process's time on the CPU while the members send a heartbeat each second, and while they keep to
the interval that the coordinator's answers tell them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from rollmesh.aio.awake import AwakeClock
from rollmesh.data.datasets import open_dataset
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.server import Server
from rollmesh.types import MemberReport, Role
from rollmesh.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from rollmesh.wire.control import Caller
from services.coordinator.main import build
from services.coordinator.servicer import CoordinatorServicer
from tests.bench.figures import Figure, median
from tests.bench.peer import Peer, say
from tests.unit.coordinator.harness import mesh_config

NUM_MEMBERS = 1000
NUM_CONNECTIONS = 100
INTERVAL_S = 1.0
RUN_ID = "heartbeats"


def run(quick: bool) -> list[Figure]:
    """The part of a core that heartbeats take, in turns."""
    window_s, num_pairs = (5.0, 1) if quick else (15.0, 3)
    with Peer(["-m", "tests.bench.heartbeats"]) as peer:
        where = peer.answer()
        shares = uvloop.run(_measure(where["address"], where["pid"], window_s, num_pairs))
    fixed, told = (list(column) for column in zip(*shares, strict=True))
    return [
        Figure(
            "heartbeats",
            "coordinator's CPU time for 1,000 members at the interval it tells / at one heartbeat a second",
            0.5,
            "at most",
            [ours / theirs for ours, theirs in zip(told, fixed, strict=True)],
            {"cores_told": median(told), "cores_at_one_second": median(fixed), "num_members": NUM_MEMBERS},
        )
    ]


async def _measure(address: str, pid: int, window_s: float, num_pairs: int) -> list[tuple[float, float]]:
    clients = [CoordinatorClient(address, f"connection-{index}") for index in range(NUM_CONNECTIONS)]
    callers = [Caller(f"rollout-{index}", f"start-{index}") for index in range(NUM_MEMBERS)]
    for index, caller in enumerate(callers):
        clients[index % NUM_CONNECTIONS].caller = caller
        await clients[index % NUM_CONNECTIONS].register(RUN_ID, Role.ROLLOUT, "127.0.0.1:1")
    shares = []
    for _ in range(num_pairs):
        fixed = await _share(clients, callers, pid, window_s, is_told=False)
        shares.append((fixed, await _share(clients, callers, pid, window_s, is_told=True)))
    for client in clients:
        await client.close()
    return shares


async def _share(
    clients: list[CoordinatorClient], callers: list[Caller], pid: int, window_s: float, *, is_told: bool
) -> float:
    """CPU seconds of the coordinator per second, once all members have found their interval."""

    async def beat(index: int) -> None:
        await asyncio.sleep(INTERVAL_S * index / NUM_MEMBERS)
        client, number = clients[index % NUM_CONNECTIONS], 0
        while True:
            client.caller, number = callers[index], number + 1
            answer = await client.heartbeat(MemberReport(num_generated_tokens=number, num_moves=number), timeout_s=30.0)
            await asyncio.sleep(answer.interval_s if is_told else INTERVAL_S)

    members = [asyncio.create_task(beat(index)) for index in range(NUM_MEMBERS)]
    await asyncio.sleep(2 * INTERVAL_S)
    began, cpu_s = time.monotonic(), _cpu_s(pid)
    await asyncio.sleep(window_s)
    share = (_cpu_s(pid) - cpu_s) / (time.monotonic() - began)
    for task in members:
        task.cancel()
    await asyncio.gather(*members, return_exceptions=True)
    return share


def _cpu_s(pid: int) -> float:
    """Seconds that a process has spent on the CPU (Linux, proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _serve() -> None:
    """The second process: serves until its input ends."""
    with tempfile.TemporaryDirectory() as folder:
        config = mesh_config(Path(folder), "redis://127.0.0.1:1", run={"name": RUN_ID})
        assert config.replay.url is not None
        redis = connect(config.replay.url, 1.0)
        train = open_dataset(config.data, "train")
        coordinator, _ = build(config, CoordinatorLedger(redis, RUN_ID, term=0), train, None, AwakeClock(3.0))
        service = (add_CoordinatorServiceServicer_to_server, CoordinatorServicer(coordinator))
        async with Server("127.0.0.1:0", {"rollmesh.v1.CoordinatorService": service}) as server:
            say(address=server.address, pid=os.getpid())
            await asyncio.to_thread(sys.stdin.read)
        await redis.aclose()


if __name__ == "__main__":
    asyncio.run(_serve())
