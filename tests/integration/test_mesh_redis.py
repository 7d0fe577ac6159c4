"""The replay queue dies under a mesh that trains."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fakes.listeners import process_tree
from tests.integration.mesh_runs import finish_mesh, start_mesh

pytestmark = pytest.mark.mesh

NUM_STEPS = 8


def redis_of(root: int) -> int:
    """The process of the embedded server in a mesh."""
    for pid in process_tree(root):
        if b"unixsocket" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("the mesh has no Redis")


def test_a_mesh_whose_redis_is_killed_twice_trains_every_group_once(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["run.name=run", f"training.steps={NUM_STEPS}", "training.prompts_per_step=8", "evaluation=null"]
    process = start_mesh(demo, tmp_path, settings)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 200
    for step in (2, 4):
        while not (metrics.exists() and f'"step": {step}, ' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(redis_of(process.pid), signal.SIGKILL)
    run = finish_mesh(process, folder, 200)
    assert run.exit_code == 0, run.output
    assert run.output.count("was killed by SIGKILL; it is started again on its files") == 2
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert run.accounting["is_balanced"]
    assert run.accounting["num_trained"] == NUM_STEPS * 8
    assert run.accounting["num_groups"]["failed"] == 0
