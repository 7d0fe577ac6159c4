"""One real Redis for all tests of the rollout worker."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from rollmesh.replay.embedded import EmbeddedRedis

_run_numbers = itertools.count()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def run_id() -> str:
    """A run that nobody else uses."""
    return f"rollout-{next(_run_numbers)}"
