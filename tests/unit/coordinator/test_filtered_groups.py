"""Groups that end FILTERED: another prompt takes the place, and the end of the data loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rollmesh.replay.accounting import ReasonCounter, account
from rollmesh.types import GroupState, Lease, PolicyVersion, RunState
from tests.unit.coordinator.harness import WAIT_S, Mesh, Worker


async def _filter(mesh: Mesh, lease: Lease, reason: str = "mean score 1 is not below 1") -> None:
    assert await mesh.ledger.filter_group(lease.group_id, lease.fencing_token, reason) is GroupState.FILTERED


def test_each_filtered_group_is_replaced_at_once_while_the_slots_are_full(with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        first, second = await worker.take(2)
        worker.stream.grant(50)
        assert await worker.gets_nothing()
        replaced, kept = [first], [second]
        for sequence in range(2, 8):
            await _filter(mesh, replaced[-1])
            replaced.append(await worker.lease())
            assert replaced[-1].sequence == sequence
            assert (await mesh.ledger.snapshot()).num_slots_used == 2
        kept.append(replaced.pop())
        for lease in kept:
            await mesh.commit(lease)
        batch = await mesh.train(1)
        assert [row.group_id for row in batch.rows] == [lease.group_id for lease in kept]
        assert await asyncio.to_thread(mesh.queue.num_filtered) == 6
        assert len({lease.prompt_id for lease in replaced + kept}) == 8

    with_worker(body)


def test_what_was_accepted_is_trained_in_a_last_partial_batch_when_the_data_ends(
    with_worker: Callable[..., None],
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        kept, *others = await worker.take(2)
        await mesh.commit(kept)
        for _ in range(5):
            await _filter(mesh, others.pop())
            others += await worker.take(1)
        await _filter(mesh, others.pop())
        last = await mesh.train(1)
        assert ([row.group_id for row in last.rows], last.is_last) == ([kept.group_id], True)
        await asyncio.to_thread(mesh.queue.retire, 1)
        await mesh.publish(1)
        await mesh.learner.report_step(1, PolicyVersion(0, 1), {}, True)
        assert mesh.coordinator.run.state is RunState.FINISHED
        books = await account(mesh.ledger)
        assert (books["num_opened"], books["num_trained"], books["num_groups"]["filtered"]) == (7, 1, 6)
        assert books["is_balanced"]
        assert books["pass_rate"] == 1 / 7
        assert mesh.coordinator.shortfall({GroupState.RETIRED: 1, GroupState.FILTERED: 6}) == (
            "the prompts were used up after 1 of 3 steps: of 7, 1 were trained, 6 filtered and 0 failed; the "
            "run needs 6 times as many prompts: raise training.epochs, or lower training.steps"
        )

    with_worker(body, num_rows=7)


def test_a_run_whose_groups_are_all_filtered_ends_with_the_data_and_without_a_step(
    with_worker: Callable[..., None],
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        for _ in range(6):
            (lease,) = await worker.take(1)
            await _filter(mesh, lease)
        assert await asyncio.to_thread(mesh.queue.take_batch, 1, 2, 1, WAIT_S) is None
        assert mesh.coordinator.shortfall({GroupState.FILTERED: 6}) == "", "the run goes on"
        await mesh.learner.report_step(0, PolicyVersion(0, 0), {}, True)
        assert mesh.coordinator.run.state is RunState.FINISHED
        books = await account(mesh.ledger)
        assert (books["num_opened"], books["num_groups"]["filtered"], books["pass_rate"]) == (6, 6, 0.0)
        assert books["reasons"] == {"mean score 1 is not below 1": 6}
        assert "after 0 of 3 steps: of 6, 0 were trained, 6 filtered" in mesh.coordinator.shortfall(
            {GroupState.FILTERED: 6}
        )

    with_worker(body, num_rows=3, training={"epochs": 2})


def test_reasons_that_differ_in_their_numbers_are_one() -> None:
    reasons = ReasonCounter()
    for mean in (1.25, 1.5, 1.75):
        reasons.add(f"mean score {mean} is not below 1")
    reasons.add("mean score 0 is not above 0")
    for index in range(2):
        reasons.add(f"prompt train:0:{index} has {21 + index} tokens of 20")
    assert reasons.most_common() == {
        "mean score … is not below 1": 3,
        "prompt … has … tokens of 20": 2,
        "mean score 0 is not above 0": 1,
    }
    assert reasons.total == 6


def test_reasons_stay_few_however_many_groups_end() -> None:
    reasons = ReasonCounter()
    for number in range(1000):
        reasons.add(f"all rewards are {number / 1000:g}")
        reasons.add("lease expired")
    assert reasons.most_common() == {"all rewards are …": 1000, "lease expired": 1000}
