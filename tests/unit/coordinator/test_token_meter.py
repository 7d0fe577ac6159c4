"""Throughput on virtual time."""

from __future__ import annotations

import pytest

from services.coordinator.token_meter import TokenMeter


def test_throughput_is_that_of_the_last_ten_seconds_and_no_average_of_the_run() -> None:
    now = [0.0]
    meter = TokenMeter(lambda: now[0])
    rates = []
    for second in range(141):
        now[0] = float(second)
        # a minute of loading, 20 s at 100 a second, 30 s of training, then 200 a second
        meter.observe(100 * min(max(second - 60, 0), 20) + 200 * max(second - 110, 0))
        rates.append(meter.tokens_per_s)
    assert set(rates[:61]) == {0.0}
    assert rates[61:81] == [100.0] * 20  # the same from the first second on
    assert rates[85] == pytest.approx(100 * 5 / 10)
    assert set(rates[90:111]) == {0.0}
    assert rates[111:] == [200.0] * 30
