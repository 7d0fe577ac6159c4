"""Several workers on one loop, a coordinator that sweeps, and a learner in a thread, all at the same time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from rollmesh.replay.batches import Batch, BatchQueue
from rollmesh.replay.connection import connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.ledger import CommitOutcome
from rollmesh.types import Group, GroupState, PromptId

NUM_GROUPS, NUM_SLOTS, BATCH_SIZE = 120, 16, 8
WINDOW = BATCH_SIZE + 1
LEASE_TTL_S = 0.15


def learn(url: str, run_id: str) -> list[Batch]:
    """Takes, reads, trains and retires until nothing is left."""
    client = connect_blocking(url, 5.0)
    queue = BatchQueue(client, run_id)
    batches: list[Batch] = []
    while batch := queue.take_batch(len(batches) + 1, BATCH_SIZE, WINDOW, timeout_s=30):
        batches.append(batch)
        groups = queue.payloads([row.group_id for row in batch.rows])
        assert [group.sequence for group in groups] == [row.sequence for row in batch.rows]
        queue.mark_trained(batch.step)
        queue.retire(batch.step)
        if batch.is_last:
            break
    client.close()
    return batches


async def coordinate(ledger: CoordinatorLedger, is_over: asyncio.Event) -> int:
    """Opens groups while there is room, sweeps, sets slots free; returns the most slots it ever saw taken."""
    most = 0
    while not is_over.is_set():
        snapshot = await ledger.snapshot()
        most = max(most, snapshot.num_slots_used)
        wanted = range(snapshot.num_opened, min(NUM_GROUPS, snapshot.num_opened + 4))
        if wanted:
            await ledger.open_groups([PromptId("train", 0, i) for i in wanted], num_slots=NUM_SLOTS)
        elif not snapshot.is_closed:
            await ledger.close()
        await ledger.expire_leases()
        await ledger.release_slots(through_step=10**6)
        await asyncio.sleep(0.005)
    return most


async def work(
    ledger: CoordinatorLedger,
    name: str,
    make_group: Callable[..., Group],
    is_over: asyncio.Event,
    outcomes: Counter[CommitOutcome],
) -> None:
    """Leases and commits, now and then too late, twice, or not at all."""
    choice = random.Random(name)
    while not is_over.is_set():
        for row in await ledger.lease(name, LEASE_TTL_S, 3):
            fate = choice.random()
            if fate < 0.05:
                continue  # forgotten
            if fate < 0.10:
                await ledger.give_back(row.group_id, row.fencing_token, "no mood")
                continue
            await asyncio.sleep(0.3 if fate < 0.15 else 0.002)
            group = make_group(row.prompt_id, row.sequence, row.attempt)
            for _ in range(2 if fate > 0.9 else 1):
                outcomes[await ledger.commit(group, row.fencing_token)] += 1
        await asyncio.sleep(0.002)


def test_every_group_is_trained_once_while_workers_are_late_forgetful_and_repetitive(
    url: str, run_id: str, make_group: Callable[..., Group]
) -> None:
    outcomes: Counter[CommitOutcome] = Counter()

    async def main() -> tuple[list[Batch], int, list[GroupState]]:
        clients = [connect(url, 5.0) for _ in range(4)]
        coordinator, *workers = (CoordinatorLedger(client, run_id, max_attempts=50, term=0) for client in clients)
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            opened = tasks.create_task(coordinate(coordinator, is_over))
            for number, ledger in enumerate(workers):
                tasks.create_task(work(ledger, f"rollout-{number}", make_group, is_over, outcomes))
            batches = await asyncio.wait_for(asyncio.to_thread(learn, url, run_id), 60)
            is_over.set()
        states = [row.state async for row in coordinator.rows()]
        for client in clients:
            await client.aclose()
        return batches, opened.result(), states

    batches, most_slots, states = asyncio.run(main())
    trained = [row.sequence for batch in batches for row in batch.rows]
    assert sorted(trained) == list(range(NUM_GROUPS))
    assert states == [GroupState.RETIRED] * NUM_GROUPS
    assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert most_slots <= NUM_SLOTS
    assert outcomes[CommitOutcome.ACCEPTED] == NUM_GROUPS
    assert outcomes[CommitOutcome.DUPLICATE] > 0
    assert outcomes[CommitOutcome.FENCED] > 0
    for place, sequence in enumerate(trained):
        assert sequence < place + WINDOW + BATCH_SIZE, "a batch reached beyond the window"
