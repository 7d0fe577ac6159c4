"""Runs of whole meshes as a user would start them: `rollmesh up` in a process of its own."""

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

from tests.fakes.listeners import Listener, listeners, process_tree
from tests.tether import tethered

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples" / "operators"


@dataclass(frozen=True)
class MeshRun:
    """A mesh that has ended."""

    folder: Path
    exit_code: int
    output: str
    listeners: tuple[Listener, ...] = ()
    """Where its processes listened once it had trained a step, if somebody looked."""

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def accounting(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "accounting.json").read_text())
        return content


def build_demo_model(folder: Path, *, steps: int = 300, arguments: Sequence[str] = ()) -> Path:
    """The demo's datasets and model with a shorter warm-up; returns the folder that holds both."""
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
    """`rollmesh up` on an example's mesh file with the model and data of ``demo``.

    Args:
        mesh_file: the example's.
        cwd: the working directory.
        environment: variables on top of those of this process.
        output: where stdout and stderr go.
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
    """Wait for the end; a mesh that does not end in time is killed and fails the test."""
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
    """A whole run, whose listening sockets are looked at on the way; fails the test unless it succeeds."""
    process = start_mesh(demo, runs, [f"run.name={name}", *overrides], mesh_file=mesh_file)
    wait_for_first_step(process, runs / name, timeout_s)
    found = listeners(process_tree(process.pid))
    run = replace(finish_mesh(process, runs / name, timeout_s), listeners=tuple(found))
    assert run.exit_code == 0, f"{run.output}\n{service_logs(run.folder)}"
    return run


def wait_for_first_step(process: subprocess.Popen[str], folder: Path, timeout_s: float) -> None:
    """Wait until the run has trained a step or has ended."""
    deadline = time.monotonic() + timeout_s
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)


def service_logs(folder: Path, tail: int = 1500) -> str:
    logs = sorted((folder / "logs").glob("*.log")) if (folder / "logs").exists() else []
    return "\n".join(f"--- {log.name}\n{log.read_text()[-tail:]}" for log in logs)


def processes_of(folder: Path) -> list[int]:
    """Processes of this machine that name the run folder on their command line or in their environment."""
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
