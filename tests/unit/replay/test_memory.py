"""What Redis holds does not grow with the length of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollmesh.replay import scripts
from rollmesh.replay.server import EmbeddedServer
from tests.bench.redis_memory import ALLOWED_GROWTH, Reading, SimulatedRun, growth


@pytest.fixture
def few_rows_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a short run reaches the state in which a long one stays."""
    monkeypatch.setattr(scripts, "NUM_ENDED_KEPT", 200)
    scripts.source.cache_clear()
    yield
    scripts.source.cache_clear()


@pytest.mark.usefixtures("few_rows_kept")
def test_the_memory_of_a_run_is_flat(tmp_path: Path) -> None:
    async def readings(url: str) -> list[Reading]:
        return [reading async for reading in SimulatedRun(url, 5000).readings(every=1250)]

    with EmbeddedServer.start(tmp_path) as server:
        measured = asyncio.run(asyncio.wait_for(readings(server.url), 300))
    assert [reading.num_groups // 1000 for reading in measured] == [1, 2, 3, 5]
    assert growth(measured) <= ALLOWED_GROWTH
    assert measured[-1].num_keys <= measured[0].num_keys
