"""A lease lives as long as the worker's work moves, and no longer than the coordinator lets it."""

from __future__ import annotations

import asyncio

import pytest

from rollmesh.types import Heartbeat, Lease, MemberReport, RunState
from services.rollout.lease_keeper import LeaseKeeper, LeaseOverError
from tests.fakes.waiting import run_bounded
from tests.unit.rollout.rig import lease


class Rig:
    """A keeper with a stall clock that the test moves."""

    def __init__(self, ttl_s: float, stall_timeout_s: float = 10.0) -> None:
        self.now = 0.0
        self.keeper = LeaseKeeper(ttl_s, stall_timeout_s, lambda: self.now)

    async def work(self, held: Lease) -> None:
        async with self.keeper.keep(held):
            await asyncio.Event().wait()

    async def start(self, held: Lease) -> asyncio.Task[None]:
        task = asyncio.create_task(self.work(held))
        await asyncio.sleep(0)
        return task

    def beat(self, num_moves: int, *ended: Lease) -> int:
        """Send one heartbeat and take its answer. Return the number of renewed leases."""
        report = MemberReport(num_moves=num_moves, renewals=self.keeper.renewals(num_moves))
        self.keeper.heard(report, Heartbeat(RunState.RUNNING, None, ended=tuple(lease.key for lease in ended)))
        return len(report.renewals)


def test_a_lease_that_nobody_renews_ends_with_its_time() -> None:
    async def test() -> None:
        task = await Rig(ttl_s=0.05).start(lease(ttl_s=0.05))
        with pytest.raises(LeaseOverError, match="was not renewed in time"):
            await task

    run_bounded(test())


def test_a_lease_that_is_renewed_outlives_its_time() -> None:
    async def test() -> None:
        rig = Rig(ttl_s=60.0)
        task = await rig.start(lease(ttl_s=0.2))
        assert rig.beat(1) == 1
        await asyncio.wait({task}, timeout=0.4)
        assert not task.done()
        assert rig.beat(2) == 0, "most of its life is left"
        task.cancel()
        await asyncio.wait({task})

    run_bounded(test())


def test_work_ends_at_once_when_the_coordinator_says_that_its_lease_is_over() -> None:
    async def test() -> None:
        rig = Rig(ttl_s=60.0)
        over, other = lease(0, ttl_s=1.0), lease(1, ttl_s=1.0)
        first, second = await rig.start(over), await rig.start(other)
        rig.beat(1, over)
        with pytest.raises(LeaseOverError, match="the coordinator has ended the lease"):
            await first
        assert not second.done()
        second.cancel()
        await asyncio.wait({second})

    run_bounded(test())


def test_work_that_stands_still_is_given_up_and_work_that_moves_is_not() -> None:
    async def test() -> None:
        rig = Rig(ttl_s=60.0, stall_timeout_s=10.0)
        task = await rig.start(lease(ttl_s=60.0))
        for second in range(100):
            rig.now = float(second)
            rig.beat(num_moves=second)
        rig.now += 9.0
        rig.beat(num_moves=99)
        await asyncio.sleep(0)
        assert not task.done()
        rig.now += 1.0
        rig.beat(num_moves=99)
        with pytest.raises(LeaseOverError, match="no token and no score came for 10 s"):
            await task

    run_bounded(test())


def test_a_lease_that_comes_to_an_idle_worker_has_all_its_time_to_move() -> None:
    async def test() -> None:
        rig = Rig(ttl_s=60.0, stall_timeout_s=10.0)
        rig.now = 1000.0
        task = await rig.start(lease(ttl_s=60.0))
        rig.beat(num_moves=0)
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.wait({task})

    run_bounded(test())


def test_a_timeout_of_the_work_itself_is_not_taken_for_the_end_of_the_lease() -> None:
    async def test() -> None:
        with pytest.raises(TimeoutError):
            async with Rig(ttl_s=60.0).keeper.keep(lease()):
                raise TimeoutError

    run_bounded(test())
