"""What the tests of whole meshes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.mesh_runs import build_demo_model


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's datasets and a model with a shorter warm-up."""
    return build_demo_model(tmp_path_factory.mktemp("demo"))
