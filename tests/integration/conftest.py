"""What the tests of whole meshes share, and those of engines in the test's own process."""

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
    """A folder with the demo's datasets and a model with a shorter warm-up."""
    return build_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """This process as the only rank. One for all tests: DeepSpeed never forgets the first process group it saw."""
    from services.learner.ranks import Ranks

    ranks = Ranks.start(mesh_config(Path("model"), tmp_path_factory.mktemp("ranks"), learner={"device": "cpu"}).learner)
    yield ranks
    ranks.stop()
