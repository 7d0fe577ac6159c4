"""Runs of whole meshes, started as a user starts them: `rollmesh up` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rollmesh.aio.tether import tethered
from tests.fakes.listeners import Listener, listeners, process_tree

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples" / "operators"


@dataclass(frozen=True)
class MeshRun:
    """A run of a mesh that has ended."""

    folder: Path
    exit_code: int
    output: str
    listeners: tuple[Listener, ...] = ()
    """The listening sockets of its processes after the first step; empty if the test did not look."""

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def accounting(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "accounting.json").read_text())
        return content


def build_demo_model(folder: Path, *, steps: int = 300, arguments: Sequence[str] = ()) -> Path:
    """Build the demo's datasets, and its model with a shorter warm-up. Return their folder."""
    command = [sys.executable, str(DEMO / "build.py"), "--out", str(folder), "--steps", str(steps), "--verdicts", "0"]
    subprocess.run([*command, "--heldout", "64", *arguments], check=True, timeout=180, capture_output=True)
    return folder


def start_mesh(
    demo: Path,
    runs: Path,
    overrides: Sequence[str],
    *,
    mesh_file: Path = DEMO / "mesh.yaml",
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
    output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start `rollmesh up` on an example's mesh file, with the model and the data of ``demo``. Return the process.

    Args:
        mesh_file: the mesh file of the example.
        cwd: the working directory.
        environment: variables that are added to the variables of this process.
        output: the destination of stdout and stderr.
    """
    settings = [
        f"run.directory={runs}",
        f"model.path={demo / 'model'}",
        f"data.path={demo / 'data' / 'train.jsonl'}",
        f"evaluation.data.path={demo / 'data' / 'heldout.jsonl'}",
        *overrides,
    ]
    command = [sys.executable, "-m", "rollmesh.cli", "up", str(mesh_file)]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(
        tethered(command),
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish_mesh(process: subprocess.Popen[str], folder: Path, timeout_s: float) -> MeshRun:
    """Wait for the end of the mesh. A mesh that does not end in time is stopped, and fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        raise AssertionError(f"the mesh did not end in {timeout_s} s:\n{output}\n{service_logs(folder)}") from None
    return MeshRun(folder, process.returncode, output)


def run_mesh(
    demo: Path,
    runs: Path,
    name: str,
    overrides: Sequence[str],
    timeout_s: float = 280,
    mesh_file: Path = DEMO / "mesh.yaml",
) -> MeshRun:
    """Run a mesh to its end, and record its listening sockets after the first step. A failed run fails the test."""
    process = start_mesh(demo, runs, [f"run.name={name}", *overrides], mesh_file=mesh_file)
    wait_for_first_step(process, runs / name, timeout_s)
    found = listeners(process_tree(process.pid))
    run = replace(finish_mesh(process, runs / name, timeout_s), listeners=tuple(found))
    assert run.exit_code == 0, f"{run.output}\n{service_logs(run.folder)}"
    return run


def wait_for_first_step(process: subprocess.Popen[str], folder: Path, timeout_s: float) -> None:
    """Wait until the run has trained a step or has ended, for at most ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)


def service_logs(folder: Path, tail: int = 1500) -> str:
    logs = sorted((folder / "logs").glob("*.log")) if (folder / "logs").exists() else []
    return "\n".join(f"--- {log.name}\n{log.read_text()[-tail:]}" for log in logs)


def processes_of(folder: Path) -> list[int]:
    """Return the ids of the other processes that name ``folder`` on their command line or in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text:
            found.append(int(entry.name))
    return found
