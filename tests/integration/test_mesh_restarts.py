"""Every process of a mesh is killed while the mesh trains, and is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.listeners import process_tree
from tests.integration.mesh_runs import REPOSITORY, finish_mesh, service_logs, start_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(600)]

NUM_STEPS = 60
VICTIMS = {
    2: ("rollout-1", [b"\0rollout-1\0"]),
    3: ("redis", [b"unixsocket"]),
    4: ("reward", [b"rollmesh.cli\0reward\0"]),
    5: ("reference", [b"rollmesh.cli\0reference\0"]),
    6: ("redis", [b"unixsocket"]),
    7: ("coordinator", [b"rollmesh.cli\0coordinator\0"]),
    9: ("learner", [b"rollmesh.cli\0learner\0"]),
}
"""The service to hit after each step, and words on the command line of the process that is killed. Several words lead
from a process to one of its children."""
ENGINE = [b"\0rollout-0\0", b"VLLM::EngineCore"]


def process_with(words: list[bytes], root: int) -> int:
    """Return the id of the process below ``root`` that the words lead to."""
    for word in words:
        pids = [pid for pid in sorted(process_tree(root)) if word in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert pids, f"the mesh has no process with {word!r}"
        root = pids[0]
    return root


def _status(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "rollmesh.cli", "status", "--config", str(folder / "mesh.yaml"), "--json"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    status: dict[str, Any] = json.loads(answer.stdout or "{}")
    return status


def _serves(folder: Path, name: str) -> bool:
    return any(member["name"] == name and member["is_serving"] for member in _status(folder).get("members", []))


def test_a_mesh_whose_processes_are_killed_trains_every_group_once(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["run.name=run", f"training.steps={NUM_STEPS}", "training.prompts_per_step=8", "evaluation=null"]
    settings += ["rollout.num_workers=2", "learner.checkpoint.every_steps=4"]
    process = start_mesh(demo, tmp_path, settings)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 350

    def check_time() -> None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, service_logs(folder)
        time.sleep(0.05)

    for step, (_, words) in VICTIMS.items():
        while not (metrics.exists() and f'"step": {step}, ' in metrics.read_text()):
            check_time()
        os.kill(process_with(words, process.pid), signal.SIGKILL)
    while not _serves(folder, "rollout-1"):
        check_time()
    os.kill(process_with(ENGINE, process.pid), signal.SIGKILL)
    run = finish_mesh(process, folder, 250)
    assert run.exit_code == 0, run.output
    started = [line for line in run.output.splitlines() if "it is started again" in line]
    names = [line.removeprefix("warning: ").split()[0] for line in started]
    hit = [*(name for name, _ in VICTIMS.values()), "rollout-0"]
    assert sorted(names) == sorted(hit)  # two deaths may be noticed at once
    assert sorted(restart["process"] for restart in run.accounting["restarts"]) == sorted(hit)
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert run.accounting["is_balanced"]
    assert run.accounting["num_trained"] == NUM_STEPS * 8
    assert run.accounting["num_groups"]["failed"] == 0
