"""A task that is cancelled while it talks to Redis ends, wherever in a command the cancellation meets it."""

from __future__ import annotations

import asyncio

from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger

NUM_CANCELLATIONS = 150


async def poll(ledger: CoordinatorLedger) -> None:
    """What the coordinator's tasks are made of: looks at the ledger until cancelled."""
    while True:
        await ledger.snapshot()


def test_a_cancellation_that_meets_a_command_half_way_is_not_lost(url: str, run_id: str) -> None:
    async def scenario() -> None:
        client = connect(url, 5.0)
        ledger = CoordinatorLedger(client, run_id, term=0)
        try:
            for num_passes in range(NUM_CANCELLATIONS):
                task = asyncio.create_task(poll(ledger))
                for _ in range(num_passes):  # another point of the command each time
                    await asyncio.sleep(0)
                task.cancel()
                _, running = await asyncio.wait({task}, timeout=20.0)
                task.cancel()
                assert not running, f"the cancellation after {num_passes} passes of the loop was lost"
        finally:
            await client.aclose()

    asyncio.run(scenario())


def test_a_deadline_around_a_command_still_ends_as_a_deadline(url: str, run_id: str) -> None:
    async def scenario() -> None:
        client = connect(url, 5.0)
        ledger = CoordinatorLedger(client, run_id, term=0)
        try:
            for num_microseconds in range(0, 3000, 100):
                try:
                    async with asyncio.timeout(num_microseconds / 1e6):
                        await poll(ledger)
                except TimeoutError:
                    continue
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            assert (await ledger.snapshot()).num_opened == 0, "the task goes on as if nothing had happened"
        finally:
            await client.aclose()

    asyncio.run(scenario())
