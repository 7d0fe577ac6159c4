"""A mesh whose processes are all killed, and which is resumed, ends as a mesh that is not killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollmesh.aio.tether import tethered
from tests.fakes.listeners import process_tree
from tests.integration.mesh_runs import REPOSITORY, MeshRun, finish_mesh, processes_of, run_mesh, start_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(900)]

NUM_STEPS = 6
SETTINGS = [
    f"training.steps={NUM_STEPS}",
    "training.prompts_per_step=8",
    "training.samples_per_prompt=4",
    "training.max_staleness=0",
    "sampling.is_seeded=true",
    "evaluation.every_steps=3",
    "learner.checkpoint.every_steps=2",
    "learner.should_record_batches=true",
]


def kill_at_step(process: subprocess.Popen[str], folder: Path, step: int, timeout_s: float = 200) -> None:
    """Wait until the mesh has trained ``step``, and kill all its processes, the launcher first."""
    deadline = time.monotonic() + timeout_s
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step}, ' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} did not come in {timeout_s} s"
        time.sleep(0.05)
    for pid in sorted(process_tree(process.pid), key=lambda pid: pid != process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    while left := [pid for pid in processes_of(folder) if pid != os.getpid()]:
        assert time.monotonic() < deadline, f"processes {left} outlived their mesh"
        time.sleep(0.05)


def resume(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rollmesh.cli", "resume", str(folder)]
    return subprocess.Popen(
        tethered(command),
        cwd=folder.parent,  # another folder than at the start of the run
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def weights(run: MeshRun) -> dict[str, Any]:
    return dict(AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype="auto").state_dict())


def test_a_mesh_killed_twice_ends_as_one_that_was_not(demo: Path, tmp_path: Path) -> None:
    """The accounting, the mean rewards and the weights are those of an undisturbed run with the same seed."""
    whole = run_mesh(demo, tmp_path, "whole", SETTINGS)
    process, folder = start_mesh(demo, tmp_path, ["run.name=killed", *SETTINGS]), tmp_path / "killed"
    kill_at_step(process, folder, 3)
    process = resume(folder)
    kill_at_step(process, folder, 5)
    run = finish_mesh(resume(folder), folder, 280)
    assert run.exit_code == 0, run.output
    assert "goes on after step 4" in run.output
    assert run.accounting["num_groups"] == whole.accounting["num_groups"]
    assert run.accounting["is_balanced"]
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert [line["step"] for line in run.lines("evaluations.jsonl")] == [0, 3, 6]
    for line, expected in zip(run.lines("metrics.jsonl"), whole.lines("metrics.jsonl"), strict=True):
        assert line["reward/mean"] == expected["reward/mean"]
        assert line["staleness/max"] == 0
    trained, expected_weights = weights(run), weights(whole)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)
