"""A part of the kill matrix on real meshes: nothing is lost, nothing is trained twice. `make chaos` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.matrix import Cell, Hit
from tests.chaos.run import run_hits

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(1200)]

STARTED_AGAIN = ["reward@scoring", "redis@batched", "reference@leased", "redis@transfer"]
RESUMED = ["learner:rank-1@checkpoint", "up@training"]


@pytest.mark.parametrize("cells", [STARTED_AGAIN, RESUMED], ids=["started again", "resumed"])
def test_a_mesh_that_is_hit_at_chosen_moments_trains_every_group_once(
    demo: Path, tmp_path: Path, cells: list[str]
) -> None:
    hits = [Hit(Cell(*cell.split("@")), place) for place, cell in enumerate(cells, start=1)]
    assert list(map(str, run_hits(demo, tmp_path, "hit", hits))) == cells
