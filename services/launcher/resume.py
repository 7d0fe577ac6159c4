"""`rollmesh resume` and `rollmesh up --resume`: go on with the run in a run folder.

::

    run folder ─► claim ─► requested.yaml against the new configuration ─► preflight ─► Redis ─► local_run

This module checks the run folder, removes checkpoints and exports that were being written, and starts the same run
again: with the same folder, the same id, the same Redis and new ports. The learner finds its checkpoint by itself, and
the coordinator finds the ledger by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rollmesh.config import with_absolute_paths
from rollmesh.errors import ConfigError
from rollmesh.replay.accounting import EndState
from rollmesh.replay.identity import expect_own_run
from rollmesh.telemetry.json_lines import JsonLines
from services.config import MeshConfig
from services.launcher.main import claim_folder, print_findings, start
from services.launcher.outcome import ACCOUNTING, drop_incomplete, read_json
from services.launcher.processes import wait_until_unused
from services.launcher.resume_rules import Change, check_changes
from services.launcher.run_folder import (
    RESOLVED,
    complete_checkpoints,
    note_start,
    read_requested,
    read_starts,
    unusable_folder,
    with_run,
    write_requested,
)

LEFTOVERS_S = 30.0
"""Time for the processes of the run so far to end."""


def resume_folder(folder: Path, overrides: Sequence[str]) -> int:
    """Go on with the run in ``folder``, with the configuration in that folder. Return the exit code.

    The processes work in the working directory of the run's first start: a reward function may open files there.

    Args:
        folder: the run folder.
        overrides: settings of the form KEY=VALUE, as after ``--set``.

    Raises:
        ConfigError: the run cannot go on; no process was started.
    """
    folder = folder.resolve()
    config = with_absolute_paths(read_requested(folder, overrides))
    starts = read_starts(folder)
    if starts:
        _enter(Path(starts[0]["working_directory"]))
    return resume(config)


def resume(config: MeshConfig) -> int:
    """Go on with the run whose folder ``config`` names. Return the exit code.

    Raises:
        ConfigError: the folder holds no run, or the run cannot go on; no process was started.
    """
    config = with_absolute_paths(config)
    folder = config.run.folder.resolve()
    if not (folder / RESOLVED).exists():
        raise ConfigError("run.name", f"there is no run in {folder}", "leave out --resume, or correct the name")
    with claim_folder(folder):
        before = read_requested(folder)
        config = with_run(config, id=before.run.id, directory=folder.parent)
        changes = check_changes(before, config)
        step = max(complete_checkpoints(folder), default=0)
        check_can_go_on(folder, before, config, step)
        check_leftovers(folder)
        print_findings(config)
        if config.replay.url is not None:
            assert config.run.id is not None
            expect_own_run(config.replay.url, config.replay.timeout_s, config.run.name, config.run.id)
        _print_start(folder, config, step, changes)
        _prepare(folder, config, step, changes)
        return start(config, folder, is_resumed=True)


def _enter(folder: Path) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        problem = f"{folder}, in which the run was started, cannot be entered ({error.strerror})"
        print(f"warning: {problem}; the run goes on in {Path.cwd()}", file=sys.stderr, flush=True)


def check_can_go_on(folder: Path, before: MeshConfig, config: MeshConfig, step: int) -> None:
    """Refuse a run that is complete, and a run that trained steps without keeping a checkpoint.

    Args:
        folder: the run folder.
        before: the configuration of the run so far.
        config: the configuration with which the run is to go on.
        step: the step of the newest complete checkpoint; 0 for none.

    Raises:
        ConfigError: the run cannot go on; the message says why.
    """
    steps, epochs = before.training.steps, before.training.epochs
    is_longer = config.training.steps > steps or config.training.epochs > epochs
    if read_json(folder / ACCOUNTING).get("state") == EndState.COMPLETED.value and not is_longer:
        problem = f"the run {config.run.name!r} is complete with {steps} steps"
        raise ConfigError("training.steps", problem, f"ask for more, e.g. --set training.steps={2 * steps}")
    trained = JsonLines(folder / "metrics.jsonl").read()
    if trained and step == 0 and before.learner.checkpoint.is_only_last:
        step = trained[-1]["step"]
        problem = f"is none, and every_minutes too, so that step {step} was trained and no checkpoint was kept"
        raise ConfigError("learner.checkpoint.every_steps", problem, "start the run anew with --overwrite")


def check_leftovers(folder: Path) -> None:
    """Wait for the processes of the run so far. They end with their launcher, but need a moment to end.

    Raises:
        ConfigError: a process still runs after `LEFTOVERS_S`; the message names its log.
    """
    if used := wait_until_unused(sorted((folder / "logs").glob("*.log")), LEFTOVERS_S):
        problem = f"processes of the run's earlier part have not ended after {LEFTOVERS_S:g} s and may write {used[0]}"
        raise ConfigError("run.name", problem, f"end them; `fuser {used[0]}` lists them")


def _print_start(folder: Path, config: MeshConfig, step: int, changes: Sequence[Change]) -> None:
    where = f"after step {step}" if step else "from the model as given: there is no checkpoint yet"
    print(f"  {'run':<11}{folder} · goes on {where} · {config.training.steps} steps at most", flush=True)
    for change in changes:
        print(f"  {'changed':<11}{change}", flush=True)


def _prepare(folder: Path, config: MeshConfig, step: int, changes: Sequence[Change]) -> None:
    """Make the run folder ready for the resumed part.

    Checkpoints and exports that were being written are removed, and so is the accounting of the earlier end. The logs
    get a line each. `requested.yaml` and `starts.jsonl` get the new configuration and the new start.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    earlier_end = str(read_json(folder / ACCOUNTING).get("state", ""))
    try:
        drop_incomplete(folder)
        mark_logs(folder, step)
        write_requested(folder, config)
        note_start(folder, after_step=step, changes=[str(change) for change in changes], earlier_end=earlier_end)
        (folder / ACCOUNTING).unlink(missing_ok=True)
    except OSError as error:
        raise unusable_folder(error, "make the folder writable") from error


def mark_logs(folder: Path, step: int) -> None:
    """Add a line to each log that says where the resumed part begins. A last line that was cut short is ended first."""
    line = f"---- resumed after step {step} at {datetime.now(UTC).isoformat(timespec='seconds')} ----\n"
    for path in sorted((folder / "logs").glob("*.log")):
        with path.open("ab+") as log:
            log.seek(max(0, path.stat().st_size - 1))
            is_cut = log.read() not in (b"", b"\n")
            log.write(("\n" * is_cut + line).encode())
