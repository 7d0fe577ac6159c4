"""Files of users, and pools that run them."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rollmesh.aio.supervisor import Supervisor
from services.reward.pool import RewardPool

WriteFunction = Callable[[str], Path]


@pytest.fixture
def write_function(tmp_path: Path) -> WriteFunction:
    def write(source: str) -> Path:
        path = tmp_path / "graders.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return write


@contextlib.asynccontextmanager
async def running_pool(path: Path, **settings: Any) -> AsyncIterator[RewardPool]:
    defaults: dict[str, Any] = {"num_processes": 1, "samples_per_call": 1, "timeout_s": 20.0, "start_timeout_s": 20.0}
    pool = RewardPool(path, **(defaults | settings))
    await pool.start()
    try:
        async with Supervisor() as supervisor:
            supervisor.spawn(pool.run(), "reward pool")
            yield pool
    finally:
        await pool.close()
