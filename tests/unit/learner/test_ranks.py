"""Ranks of the learner that were never started: the error comes at once or after a deadline."""

from __future__ import annotations

import pytest

from rollmesh.errors import ConfigError
from services.learner.checks import check_ranks


@pytest.mark.parametrize(
    ("num_ranks", "environment"),
    [
        (1, {}),
        (1, {"RANK": "0", "WORLD_SIZE": "1"}),
        (1, {"WORLD_SIZE": "1"}),
        (2, {}),
        (2, {"WORLD_SIZE": "8"}),  # this process starts the ranks with another WORLD_SIZE
        (2, {"RANK": "1", "WORLD_SIZE": "2"}),
    ],
)
def test_ranks_of_the_learner_itself_are_accepted(num_ranks: int, environment: dict[str, str]) -> None:
    check_ranks(num_ranks, environment)


@pytest.mark.parametrize(
    ("num_ranks", "environment"),
    [
        (1, {"RANK": "1", "WORLD_SIZE": "4"}),
        (1, {"WORLD_SIZE": "4"}),
        (1, {"RANK": "0"}),
        (2, {"RANK": "0", "WORLD_SIZE": "4"}),
        (2, {"RANK": "2", "WORLD_SIZE": "2"}),
        (2, {"RANK": "-1", "WORLD_SIZE": "2"}),
        (1, {"RANK": "0", "WORLD_SIZE": "many"}),
    ],
)
def test_ranks_of_a_job_around_the_mesh_are_refused_with_the_variables(
    num_ranks: int, environment: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=r"learner\.num_ranks.*unset RANK, WORLD_SIZE and MASTER_ADDR"):
        check_ranks(num_ranks, environment)
