"""What a process slept through is nobody's silence."""

from __future__ import annotations

import time

from rollmesh.aio.awake import AwakeClock, boot_time


def test_a_gap_between_readings_is_sleep_and_does_not_count() -> None:
    now = [10.0]
    clock = AwakeClock(3.0, lambda: now[0])
    readings = []
    for now[0] in (10.0, 11.0, 71.0, 72.0):
        readings.append(clock())
    assert readings == [0.0, 1.0, 1.0, 2.0]
    assert clock.take_slept_s() == 60.0
    assert clock.take_slept_s() == 0.0


def test_sleep_is_noticed_by_asking_for_it() -> None:
    now = [0.0]
    clock = AwakeClock(3.0, lambda: now[0])
    now[0] = 4.0
    assert clock.take_slept_s() == 4.0
    assert clock() == 0.0


def test_the_default_source_counts_suspensions_and_never_goes_back() -> None:
    first = boot_time()
    assert first <= boot_time()
    assert first >= time.monotonic() - 1.0
