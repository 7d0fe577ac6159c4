"""The worked examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from rollmesh import algorithms
from rollmesh.algorithms.advantages import ESTIMATORS
from rollmesh.algorithms.corrections import CORRECTIONS
from rollmesh.algorithms.kl import KL_ESTIMATORS
from rollmesh.algorithms.losses import POLICY_LOSSES

MODULES = sorted(module.name for module in pkgutil.walk_packages(algorithms.__path__, f"{algorithms.__name__}."))
WITHOUT_FORMULA = {"no_baseline", "against_behaviour", "against_old"}


@pytest.mark.parametrize("name", MODULES)
def test_the_worked_examples_of_a_module_are_right(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_formula_that_the_configuration_can_name_has_a_worked_example() -> None:
    baselines = [estimator.baseline for estimator in ESTIMATORS.values()]
    formulas = [*baselines, *KL_ESTIMATORS.values(), *POLICY_LOSSES.values(), *CORRECTIONS.values()]
    names = {formula.__name__ for formula in formulas if ">>>" not in (formula.__doc__ or "")}  # type: ignore[attr-defined]
    assert names == WITHOUT_FORMULA
