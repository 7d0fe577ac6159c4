"""One real Redis for all tests of the coordinator, and a mesh for each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollmesh.replay.embedded import EmbeddedRedis
from tests.unit.coordinator.harness import Mesh, Worker, mesh_config, running_mesh


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def with_worker(tmp_path: Path, redis_url: str) -> Callable[..., None]:
    def run(body: Callable[[Mesh, Worker], Awaitable[None]], num_rows: int = 100, **sections: dict[str, Any]) -> None:
        """One worker, and version 0 published unless the body does it."""

        async def scenario() -> None:
            async with running_mesh(mesh_config(tmp_path, redis_url, num_rows, **sections)) as mesh:
                await body(mesh, await mesh.join())

        asyncio.run(asyncio.wait_for(scenario(), 60))

    return run
