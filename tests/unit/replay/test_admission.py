from __future__ import annotations

import pytest

from rollmesh.replay.admission import staleness_bound, window


@pytest.mark.parametrize(("num_slots", "expected"), [(1, 1), (3, 1), (6, 1), (7, 2), (10, 3), (64, 19), (110, 33)])
def test_window_is_three_tenths_of_the_slots_and_at_least_one(num_slots: int, expected: int) -> None:
    assert window(num_slots) == expected


@pytest.mark.parametrize(
    ("max_staleness", "num_slots", "groups_per_batch", "max_version_lag", "expected"),
    [
        (0, 2, 2, 0, 0),  # W = 1: synchronous
        (0, 32, 32, 0, 1),  # W = 9: eight groups may overtake, less than a batch
        (1, 64, 32, 0, 2),  # W = 19
        (4, 160, 32, 0, 6),  # W = 48: 47 groups are two batches
        (4, 160, 32, 2, 8),
        (9, 10, 1, 0, 11),  # W = 3: two batches of one group
    ],
)
def test_staleness_bound_adds_overtaking_batches_and_worker_lag(
    max_staleness: int, num_slots: int, groups_per_batch: int, max_version_lag: int, expected: int
) -> None:
    assert staleness_bound(max_staleness, num_slots, groups_per_batch, max_version_lag) == expected


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="num_slots"):
        window(0)
    with pytest.raises(ValueError, match="B = 0"):
        staleness_bound(1, 4, 0, 0)
