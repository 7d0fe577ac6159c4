"""The preflight checks the limits of the machine for an engine."""

from __future__ import annotations

import resource

import pytest

from rollmesh.errors import ConfigError
from services.rollout.preflight import MIN_OPEN_FILES, num_open_files


@pytest.mark.parametrize(
    ("hard", "most"),
    [(4096, 4096), (10**9, 65_536), (resource.RLIM_INFINITY, 65_536), (MIN_OPEN_FILES, MIN_OPEN_FILES)],
)
def test_an_engine_may_open_as_many_files_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, hard: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    assert num_open_files() == most


def test_a_system_that_allows_too_few_files_is_told_of_before_an_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ConfigError, match=r"^rollout: a process may open 64 files here, and vLLM needs 256; raise"):
        num_open_files()
