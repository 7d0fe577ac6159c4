"""Redis, the reward server and the reference are killed while a mesh trains, and are started again."""

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
VICTIMS = {
    2: ("redis", b"unixsocket"),
    3: ("reward", b"rollmesh.cli\0reward\0"),
    4: ("reference", b"rollmesh.cli\0reference\0"),
    5: ("redis", b"unixsocket"),
}
"""The process to kill after each step, and words on its command line."""


def process_with(words: bytes, root: int) -> int:
    """Return the id of the process below ``root`` that has these words on its command line."""
    for pid in sorted(process_tree(root)):
        if words in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"the mesh has no process with {words!r}")


def test_a_mesh_whose_redis_and_scorers_are_killed_trains_every_group_once(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["run.name=run", f"training.steps={NUM_STEPS}", "training.prompts_per_step=8", "evaluation=null"]
    process = start_mesh(demo, tmp_path, settings)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 250
    for step, (_, words) in VICTIMS.items():
        while not (metrics.exists() and f'"step": {step}, ' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process_with(words, process.pid), signal.SIGKILL)
    run = finish_mesh(process, folder, 250)
    assert run.exit_code == 0, run.output
    started = [line for line in run.output.splitlines() if "it is started again" in line]
    names = [line.removeprefix("warning: ").split()[0] for line in started]
    assert sorted(names) == sorted(name for name, _ in VICTIMS.values())  # two deaths may be noticed at once
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert run.accounting["is_balanced"]
    assert run.accounting["num_trained"] == NUM_STEPS * 8
    assert run.accounting["num_groups"]["failed"] == 0
    assert run.accounting["num_retried"] == 0
