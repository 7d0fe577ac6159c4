"""The learner's connection to the coordinator, as the thread that trains uses it: no call waits for ever."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from rollmesh.errors import DeadlineError, InvalidArgumentError, UnavailableError
from rollmesh.types import PolicyVersion
from services.learner.control import Control
from services.learner.phase import PhaseTracker
from tests.fakes.coordinator import FakeCoordinator
from tests.unit.learner.samples import mesh_config

V1 = PolicyVersion(0, 1)
LIMIT_S = 100.0
REFUSED = InvalidArgumentError("metrics are refused", "metrics")

Training = Callable[[Control, FakeCoordinator], None]


def _control(folder: Path, address: str) -> Control:
    config = mesh_config(folder, folder)
    return Control(config.run, address, "127.0.0.1:0", "learner", PhaseTracker(60.0))


def _train(folder: Path, training: Training) -> FakeCoordinator:
    """Run ``training`` on another thread, with a started `Control` and a fake coordinator. Return the coordinator."""

    def train(control: Control, coordinator: FakeCoordinator) -> None:
        control.start()
        try:
            training(control, coordinator)
        finally:
            control.stop()

    async def scenario() -> FakeCoordinator:
        coordinator = FakeCoordinator()
        async with coordinator.serve() as server:
            await asyncio.to_thread(train, _control(folder, server.address), coordinator)
        return coordinator

    return asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))


def test_a_publish_that_is_under_way_when_the_coordinator_is_lost_ends_with_that_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        coordinator = FakeCoordinator(member_timeout_s=0.3)
        coordinator.stalled.add("FinishPublish")
        async with coordinator.serve() as server:
            control = _control(tmp_path, server.address)
            await asyncio.to_thread(control.start)
            outcome = control.finish_publish(V1, b"d" * 32, "", timeout_s=60.0)
            while not coordinator.num_calls["FinishPublish"]:  # noqa: ASYNC110 (bounded by the test)
                await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError, match="no answer for"):
            await asyncio.to_thread(outcome.result, 50.0)
        with pytest.raises(UnavailableError, match="no answer for"):
            control.check()
        control.stop()

    asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))
    gc.collect()
    assert "Task was destroyed" not in caplog.text


def test_a_call_without_an_answer_is_cancelled_when_the_learner_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def training(control: Control, coordinator: FakeCoordinator) -> None:
        coordinator.stalled.add("ReportStep")
        control.report_step(1, V1, {})

    _train(tmp_path, training)
    gc.collect()
    assert "Task was destroyed" not in caplog.text


def test_reports_that_are_slow_or_refused_end_no_training_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(control: Control, coordinator: FakeCoordinator) -> None:
        monkeypatch.setattr("services.learner.control.REPORT_PATIENCE_S", 0.1)
        coordinator.stalled.add("ReportStep")
        control.report_step(1, V1, {})
        control.report_step(2, V1, {})  # counts the first report as lost
        control._settle_report()
        assert control.num_lost_reports == 2
        coordinator.stalled.clear()
        monkeypatch.setattr("services.learner.control.REPORT_PATIENCE_S", 30.0)
        coordinator.fail_next("ReportStep", REFUSED)
        control.report_step(3, V1, {"reward/mean": 0.5})
        control.report_step(4, V1, {}, is_last=True)
        assert control.num_lost_reports == 3

    coordinator = _train(tmp_path, training)
    assert [call.step for call in coordinator.steps] == [4]
    assert "a step's metrics did not reach the coordinator" in caplog.text


def test_the_last_report_is_repeated_until_it_arrives(tmp_path: Path) -> None:
    def training(control: Control, coordinator: FakeCoordinator) -> None:
        coordinator.fail_next("ReportStep", DeadlineError("too slow"), UnavailableError("away"))
        control.report_step(4, V1, {}, is_last=True)

    coordinator = _train(tmp_path, training)
    assert [(call.step, call.is_last) for call in coordinator.steps] == [(4, True)]


def test_a_last_report_that_is_refused_is_an_error(tmp_path: Path) -> None:
    def training(control: Control, coordinator: FakeCoordinator) -> None:
        coordinator.fail_next("ReportStep", REFUSED)
        with pytest.raises(InvalidArgumentError, match="metrics are refused"):
            control.report_step(5, V1, {}, is_last=True)

    assert _train(tmp_path, training).steps == []
