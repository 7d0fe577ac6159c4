"""Old checkpoints go by number and by size. The newest stays, and the best stays as long as its size permits."""

from __future__ import annotations

import itertools

import pytest

from services.learner.rotation import steps_to_drop

SIZES = {10: 100, 20: 100, 30: 100, 40: 100}


@pytest.mark.parametrize(
    ("best", "max_kept", "max_bytes", "dropped"),
    [
        (None, 2, None, [10, 20]),
        (10, 2, None, [20]),
        (40, 2, None, [10, 20]),
        (None, 9, None, []),
        (10, 2, 250, [20, 30]),
        (10, 2, 150, [20, 30, 10]),
        (None, 4, 399, [10]),
        (None, 4, 400, []),
        (20, 1, 1, [10, 30, 20]),
    ],
)
def test_what_is_dropped(best: int | None, max_kept: int, max_bytes: int | None, dropped: list[int]) -> None:
    assert steps_to_drop(SIZES, best, max_kept, max_bytes) == dropped


def test_the_newest_stays_whatever_the_limits() -> None:
    for best, max_kept, max_bytes in itertools.product([None, *SIZES], [1, 2, 9], [None, 1, 100, 250]):
        assert 40 not in steps_to_drop(SIZES, best, max_kept, max_bytes)
    assert steps_to_drop({}, None, 1, 1) == []
