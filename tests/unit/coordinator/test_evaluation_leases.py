"""Evaluation rounds over real gRPC: priority, pinning, and the end of the run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rollmesh.types import LeaseKind, RunState
from tests.unit.coordinator.harness import (
    Mesh,
    Worker,
    evaluation_sample,
    evaluation_section,
    work_through,
)


def test_evaluation_goes_before_training_and_pins_the_version(tmp_path: Path, with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        leases = await worker.take(4)
        assert [lease.kind for lease in leases] == [LeaseKind.EVALUATE] * 3 + [LeaseKind.TRAIN]
        assert leases[0].sampling.temperature == 0
        begin = asyncio.create_task(mesh.begin(1))
        for lease in leases[:2]:
            await worker.client.report_evaluation(lease.group_id, lease.fencing_token, [evaluation_sample(1.0)])
        await asyncio.sleep(0.2)
        assert not begin.done(), "the version is pinned until the round is complete"
        await worker.client.report_evaluation(leases[2].group_id, leases[2].fencing_token, [evaluation_sample(0.0)])
        await begin
        line = json.loads((mesh.config.run.folder / "evaluations.jsonl").read_text())
        assert (line["version"], line["num_prompts"], line["num_failed"]) == ("0.0", 3, 0)
        assert line["pass_at_1"] == pytest.approx(2 / 3)

    with_worker(body, evaluation=evaluation_section(tmp_path))


def test_the_run_is_finished_only_when_the_last_evaluation_is(tmp_path: Path, with_worker: Callable[..., None]) -> None:
    async def answer(worker: Worker, count: int) -> None:
        for lease in await worker.take(count):
            assert lease.kind is LeaseKind.EVALUATE
            await worker.client.report_evaluation(lease.group_id, lease.fencing_token, [evaluation_sample(1.0)])

    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        await answer(worker, 3)
        await work_through(mesh, worker, steps=1, batch=2)
        assert (await worker.client.heartbeat()).run_state is RunState.FINISHING
        await answer(worker, 3)
        assert (await worker.client.heartbeat()).run_state is RunState.FINISHED
        lines = (mesh.config.run.folder / "evaluations.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1]

    with_worker(body, training={"steps": 1}, evaluation=evaluation_section(tmp_path, every_steps=10))


def test_a_run_whose_last_evaluation_expires_is_finished(tmp_path: Path, with_worker: Callable[..., None]) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        for lease in await worker.take(1):
            await worker.client.report_evaluation(lease.group_id, lease.fencing_token, [evaluation_sample(1.0)])
        await work_through(mesh, worker, steps=1, batch=2)
        await worker.take(1)
        assert (await worker.client.heartbeat()).run_state is RunState.FINISHING
        await mesh.pass_time(3.1)
        assert mesh.coordinator.run.state is RunState.FINISHED

    with_worker(
        body,
        training={"steps": 1},
        coordinator={"lease_ttl_s": 3.0, "max_attempts": 1},
        evaluation=evaluation_section(tmp_path, num_rows=1, every_steps=10),
    )


def test_an_evaluation_lease_that_was_lost_with_its_stream_is_sent_again(
    tmp_path: Path, with_worker: Callable[..., None]
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        member = mesh.coordinator.members.get("rollout-0")
        assert member is not None
        line = mesh.coordinator.dispatcher.open_line(member)
        mesh.coordinator.dispatcher.grant(line, 1)
        await mesh.publish(0)
        lost = await asyncio.wait_for(line.next(), 20)
        assert lost is not None
        mesh.coordinator.dispatcher.close_line(line)
        again, *_ = await worker.take(3)
        assert (again.group_id, again.fencing_token, again.attempt) == (lost.group_id, lost.fencing_token, 0)

    with_worker(body, evaluation=evaluation_section(tmp_path))


def test_a_failed_evaluation_lease_is_given_again_and_its_late_report_is_dropped(
    tmp_path: Path, with_worker: Callable[..., None]
) -> None:
    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        first = (await worker.take(1))[0]
        await worker.client.report_evaluation(first.group_id, first.fencing_token, [], "the scorer was away")
        again = (await worker.take(1))[0]
        assert (again.group_id, again.attempt) == (first.group_id, 1)
        await worker.client.report_evaluation(first.group_id, first.fencing_token, [evaluation_sample(1.0)])
        assert mesh.coordinator.evaluator is not None
        assert mesh.coordinator.evaluator.num_open == 3, "a late report of the first lease does not count"

    with_worker(body, evaluation=evaluation_section(tmp_path))


def test_a_held_out_row_that_cannot_be_used_is_counted_and_the_round_goes_on(
    tmp_path: Path, with_worker: Callable[..., None]
) -> None:
    section = evaluation_section(tmp_path, num_rows=2)
    with Path(section["data"]["path"]).open("a") as rows:
        rows.write('{"input": "", "label": 3}\n')

    async def body(mesh: Mesh, worker: Worker) -> None:
        await mesh.publish(0)
        worker.stream.grant(3)
        for lease in (await worker.lease(), await worker.lease()):
            await worker.client.report_evaluation(lease.group_id, lease.fencing_token, [evaluation_sample(1.0)])
        assert mesh.coordinator.evaluator is not None
        await mesh.until(lambda: mesh.coordinator.evaluator.last_result is not None)  # type: ignore[union-attr]
        result = mesh.coordinator.evaluator.last_result
        assert result is not None
        assert (result.num_prompts, result.num_failed, result.pass_at_1) == (3, 1, 1.0)

    with_worker(body, evaluation=section)
