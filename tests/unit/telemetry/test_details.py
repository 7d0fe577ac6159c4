"""Metrics whose names come from the data."""

from __future__ import annotations

import logging

import pytest

from rollmesh.telemetry.details import MAX_NAMES, Details


def test_the_details_of_several_processes_are_those_of_one() -> None:
    whole, parts = Details(), (Details(), Details())
    for number, (source, reward, logs) in enumerate(
        [("a", 1.0, {"tries": 3.0}), ("b", 0.0, {}), ("a", 0.5, {"tries": 1.0}), ("", 0.25, {"other": -1.5})]
    ):
        for details in (whole, parts[number % 2]):
            details.add_sample(source, reward, 2 * reward, logs)
    assert Details.merged(part.to_json() for part in parts).metrics() == whole.metrics()
    assert whole.metrics() == {
        "extra/other": -1.5,
        "extra/other/count": 1.0,
        "extra/tries": 2.0,
        "extra/tries/count": 2.0,
        "source/a/reward": 0.75,
        "source/a/score": 1.5,
        "source/a/count": 2.0,
        "source/b/reward": 0.0,
        "source/b/score": 0.0,
        "source/b/count": 1.0,
    }


def test_names_without_end_are_cut_and_told(caplog: pytest.LogCaptureFixture) -> None:
    details = Details()
    for number in range(MAX_NAMES + 1):
        details.add_sample("", 0.0, 0.0, {f"{number:06}": 1.0})
    with caplog.at_level(logging.WARNING):
        assert len(details.metrics()) == 2 * MAX_NAMES
    assert f"{MAX_NAMES + 1} names" in caplog.text
