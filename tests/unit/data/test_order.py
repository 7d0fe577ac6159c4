"""The order of prompts is a pure function, for ever."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

from rollmesh.data import order
from rollmesh.data.order import PromptOrder, permutation
from rollmesh.types import PromptId

GOLDEN_SEED_1_EPOCH_0 = [4, 6, 1, 3, 9, 8, 2, 0, 5, 7]
GOLDEN_SEED_1_EPOCH_1 = [5, 3, 2, 8, 7, 0, 1, 4, 9, 6]


def test_each_epoch_uses_each_row_once_in_an_order_of_its_own() -> None:
    orders = [permutation(1000, 1, epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert permutation(1000, 2, 0).tolist() != orders[0]


def test_the_order_never_changes_between_releases() -> None:
    assert permutation(10, 1, 0).tolist() == GOLDEN_SEED_1_EPOCH_0
    assert permutation(10, 1, 1).tolist() == GOLDEN_SEED_1_EPOCH_1
    assert permutation(10, -1, 0).tolist() == permutation(10, 2**64 - 1, 0).tolist()


def test_another_process_sees_the_same_order() -> None:
    program = "from rollmesh.data.order import permutation; print(permutation(50, 3, 2).tolist())"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == str(permutation(50, 3, 2).tolist())


def test_the_line_goes_from_epoch_to_epoch_and_ends() -> None:
    order = PromptOrder("train", num_rows=3, epochs=2, seed=1, should_shuffle=False)
    assert order.slice(2, 99) == [PromptId("train", 0, 2), *(PromptId("train", 1, row) for row in range(3))]
    assert len(order) == 6
    with pytest.raises(IndexError, match="outside the 6 prompts"):
        order.at(6)


def test_any_place_in_the_line_can_be_asked_for_in_any_order() -> None:
    order = PromptOrder("train", num_rows=7, epochs=3, seed=5, should_shuffle=True)
    forwards = order.slice(0, 21)
    assert [order.at(place) for place in reversed(range(21))] == forwards[::-1]
    assert len(set(forwards)) == 21


def test_rows_are_spread_evenly_over_places() -> None:
    first_places = [permutation(4, seed, 0)[0] for seed in range(4000)]
    assert all(900 < first_places.count(row) < 1100 for row in range(4))


def test_the_worked_example_of_the_order_is_right() -> None:
    found = doctest.testmod(order)
    assert found.attempted > 0
    assert found.failed == 0
