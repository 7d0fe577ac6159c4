"""`rollmesh status` of a run that is over says how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollmesh.errors import UnavailableError
from rollmesh.types import MeshStatus
from services.config import load_mesh
from services.launcher import status


def test_a_run_that_is_over_is_described_by_its_accounting(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(address: str) -> MeshStatus:
        raise UnavailableError("no connection")

    monkeypatch.setattr(status, "_ask", nobody)
    path = tmp_path / "mesh.yaml"
    path.write_text(json.dumps({**tree, "coordinator": {"address": "127.0.0.1:50051"}}))
    config = load_mesh(path)
    with pytest.raises(UnavailableError, match=r"the run is over, or was never started$"):
        status.show(config, is_json=False)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "accounting.json").write_text('{"state": "failed", "reason": "redis was killed"}')
    with pytest.raises(UnavailableError, match=r"failed \(redis was killed\); continue with: rollmesh resume /"):
        status.show(config, is_json=False)
    (config.run.folder / "accounting.json").write_text('{"state": "completed"}')
    with pytest.raises(UnavailableError, match=r"the run is over: completed$"):
        status.show(config, is_json=False)
    (config.run.folder / "accounting.json").unlink()
    (config.run.folder / "requested.yaml").touch()
    with pytest.raises(
        UnavailableError, match=r"is starting, or it was cut off: then continue with: rollmesh resume /"
    ):
        status.show(config, is_json=False)
