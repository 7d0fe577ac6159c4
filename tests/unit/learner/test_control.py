"""The learner's way to the coordinator, from the side of the thread that trains: it never waits for nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from rollmesh.errors import DeadlineError, InvalidArgumentError, UnavailableError
from rollmesh.types import PolicyVersion
from services.learner.control import Control
from services.learner.intake import Intake
from services.learner.progress import LearnerProgress
from services.learner.ranks import Ranks
from tests.fakes.coordinator import FakeCoordinator
from tests.unit.learner.samples import mesh_config

V1 = PolicyVersion(0, 1)


def test_a_publish_that_is_under_way_when_the_coordinator_is_lost_ends_with_that_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = FakeCoordinator(member_timeout_s=0.3)
        coordinator.stalled.add("FinishPublish")
        async with coordinator.serve() as server:
            config = mesh_config(tmp_path, tmp_path, coordinator={"address": server.address})
            control = Control(config, "learner", LearnerProgress(60.0))
            await asyncio.to_thread(control.start)
            outcome = control.finish_publish(V1, b"d" * 32, "", timeout_s=60.0)
            while not coordinator.num_calls["FinishPublish"]:  # noqa: ASYNC110 (bounded by the test)
                await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError, match="no answer for"):
            await asyncio.to_thread(outcome.result, 50.0)
        with pytest.raises(UnavailableError, match="no answer for"):
            control.check()
        control.stop()

    asyncio.run(asyncio.wait_for(scenario(), 100))


def test_metrics_that_do_not_arrive_end_no_training_and_the_last_report_has_to_arrive(tmp_path: Path) -> None:
    def train(control: Control, coordinator: FakeCoordinator) -> None:
        refused = InvalidArgumentError("metrics are refused", "metrics")
        control.start()
        try:
            coordinator.fail_next("ReportStep", refused, refused, refused)
            for step in (1, 2, 3):
                control.report_step(step, V1, {"reward/mean": 0.5})
            control.report_step(4, V1, {}, is_last=True)
            coordinator.fail_next("ReportStep", refused)
            with pytest.raises(InvalidArgumentError, match="metrics are refused"):
                control.report_step(5, V1, {}, is_last=True)
        finally:
            control.stop()

    async def scenario() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.serve() as server:
            config = mesh_config(tmp_path, tmp_path, coordinator={"address": server.address})
            await asyncio.to_thread(train, Control(config, "learner", LearnerProgress(60.0)), coordinator)
        assert [call.step for call in coordinator.steps] == [4]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_lost_report_of_metrics_is_counted_and_the_next_one_arrives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.learner.control.REPORT_PATIENCE_S", 0.1)

    def train(control: Control, coordinator: FakeCoordinator) -> None:
        control.start()
        coordinator.stalled.add("ReportStep")
        control.report_step(1, V1, {})
        coordinator.fail_next("ReportStep", InvalidArgumentError("metrics: not finite"))
        control.report_step(2, V1, {})
        assert control.num_lost_reports == 1
        coordinator.stalled.clear()
        monkeypatch.setattr("services.learner.control.REPORT_PATIENCE_S", 30.0)
        control.report_step(3, V1, {})
        control.report_step(4, V1, {}, is_last=True)
        assert control.num_lost_reports == 2
        assert [call.step for call in coordinator.steps][-1] == 4
        control.stop()

    async def scenario() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.serve() as server:
            config = mesh_config(tmp_path, tmp_path, coordinator={"address": server.address})
            await asyncio.to_thread(train, Control(config, "learner", LearnerProgress(60.0)), coordinator)

    asyncio.run(asyncio.wait_for(scenario(), 100))
    assert "a step's metrics did not reach the coordinator" in caplog.text


def test_the_last_report_is_repeated_until_it_arrives(tmp_path: Path) -> None:
    def train(control: Control, coordinator: FakeCoordinator) -> None:
        control.start()
        coordinator.fail_next("ReportStep", DeadlineError("too slow"), DeadlineError("too slow"))
        control.report_step(4, V1, {}, is_last=True)
        assert [call.is_last for call in coordinator.steps] == [True]
        control.stop()

    async def scenario() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.serve() as server:
            config = mesh_config(tmp_path, tmp_path, coordinator={"address": server.address})
            await asyncio.to_thread(train, Control(config, "learner", LearnerProgress(60.0)), coordinator)

    asyncio.run(asyncio.wait_for(scenario(), 100))


class QueueThatComesBack:
    """Does not answer at first, nor says why."""

    def __init__(self) -> None:
        self.num_calls = 0

    def take_batch(self, *_: object) -> None:
        self.num_calls += 1
        if self.num_calls < 3:
            raise UnavailableError("Redis does not answer")


def test_waiting_for_a_batch_outlives_a_queue_that_is_away_for_a_moment() -> None:
    queue = QueueThatComesBack()
    alone = Ranks(0, 1, torch.device("cpu"))
    assert Intake(queue, alone, 4, 1, 1, timeout_s=30.0, check=lambda: None).take(1) is None  # type: ignore[arg-type]
    assert queue.num_calls == 3
    with pytest.raises(DeadlineError, match=r"learner\.batch_timeout_s = 1 passed: Redis does not answer"):
        Intake(QueueThatComesBack(), alone, 4, 1, 1, timeout_s=1.0, check=lambda: None).take(1)  # type: ignore[arg-type]
