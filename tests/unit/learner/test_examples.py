"""The worked examples in the docstrings."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from services.learner import batching, schedule


@pytest.mark.parametrize("module", [batching, schedule])
def test_the_worked_examples_of_a_module_are_right(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
