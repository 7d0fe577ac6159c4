"""The worked examples in the docstrings."""

from __future__ import annotations

import doctest

from services.learner import batching


def test_the_worked_examples_of_batching_are_right() -> None:
    found = doctest.testmod(batching)
    assert found.attempted > 0
    assert found.failed == 0
