"""What Redis holds does not grow with the length of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from rollmesh.replay import memory, scripts
from rollmesh.replay.connection import check_server, connect_blocking
from rollmesh.replay.embedded import EmbeddedRedis
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

    with EmbeddedRedis.start(tmp_path) as server:
        measured = asyncio.run(asyncio.wait_for(readings(server.url), 300))
    assert [reading.num_groups // 1000 for reading in measured] == [1, 2, 3, 5]
    assert growth(measured) <= ALLOWED_GROWTH
    assert measured[-1].num_keys <= measured[0].num_keys


def test_half_of_what_the_process_may_use_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.default_limit_bytes()
    group = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", group)
    group.write_text("1048576\n")
    assert memory.default_limit_bytes() == 524288
    group.write_text("max\n")
    assert memory.default_limit_bytes() >= machine


@pytest.mark.parametrize(("used", "limit", "is_short"), [(84, 100, False), (85, 100, True), (10**12, 0, False)])
def test_memory_is_short_before_the_limit_and_never_without_one(used: int, limit: int, is_short: bool) -> None:
    assert memory.RedisMemory.of({"used_memory": used, "maxmemory": limit}).is_short == is_short


def test_the_servers_limit_is_that_of_the_configuration(tmp_path: Path) -> None:
    with EmbeddedRedis.start(tmp_path, memory_limit_bytes=100 * 1024 * 1024) as server:
        client = connect_blocking(server.url, 5.0)
        assert memory.RedisMemory.of(client.info("memory")).limit_bytes == 100 * 1024 * 1024
        check_server(server.url, 5.0)
        client.config_set("maxmemory", client.info("memory")["used_memory"] * 11 // 10)
        with pytest.raises(ConfigError, match=r"is nearly full: the server uses \d+ of \d+ MiB.*raise its maxmemory"):
            check_server(server.url, 5.0)
        client.close()
