"""Fixtures for tests of whole meshes, and for tests of training engines in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.mesh_runs import build_demo_model
from tests.unit.learner.samples import mesh_config

if TYPE_CHECKING:
    from services.learner.ranks import Ranks


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo's datasets and with the demo's model after a shorter warm-up."""
    return build_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Yield this process as the only rank.

    All tests share this rank, because DeepSpeed goes on using the first process group of a process.
    """
    from services.learner.ranks import Ranks

    ranks = Ranks.start(mesh_config(Path("model"), tmp_path_factory.mktemp("ranks"), learner={"device": "cpu"}).learner)
    yield ranks
    ranks.stop()
