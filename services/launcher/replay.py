"""`rollmesh replay`: the learner's side of a run once more, from the recorded batches, compared with the run.

::

    RUN/batches, RUN/checkpoints ─► plan ─► a learner for each part ─► OUT/metrics.jsonl, OUT/export
                                                                            │
    RUN/metrics.jsonl, RUN/export ──────────────────────────────────────────┴─► the first difference, or none

There is no Redis, no coordinator and no engine. This module does not need torch; the learners are processes of their
own, whose output is OUT/replay.log.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError, DeadlineError, ReplayError
from rollmesh.replay.replay_part import ReplayPart
from rollmesh.telemetry.json_lines import JsonLines
from services.config import MeshConfig, load_mesh
from services.launcher.processes import ServiceProcess, is_in_use
from services.launcher.replay_comparison import Difference, compare_export, compare_step, describe_step
from services.launcher.replay_plan import StepRange, plan_replay
from services.launcher.run_folder import check_is_run

DEFAULT_OUT = "replay"
"""The folder in the run folder that gets a replay for which the user names no folder."""
_POLL_S = 0.2
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of a replay.

    Attributes:
        steps: the steps that were repeated.
        num_compared: the number of these steps whose metrics the run has. A run that was killed may lack the last line.
        has_compared_weights: whether the run has an export of the last step, which was compared.
        difference: the first value that differs; None where all values are the same to the bit.
        group_ids: the ids of the groups of each step. No group stands twice.
        out: the folder with the repeated metrics and the repeated export.
    """

    steps: range
    num_compared: int
    has_compared_weights: bool
    difference: Difference | None
    group_ids: Mapping[int, Sequence[str]]
    out: Path

    @property
    def is_identical(self) -> bool:
        return self.difference is None


def show(folder: Path, steps: StepRange, out: Path | None, num_ranks: int | None, overrides: Sequence[str]) -> int:
    """Repeat steps of a run, and print a line for each step and the verdict. Return the exit code.

    Args:
        folder: the run folder.
        steps: the first and the last step.
        out: the folder for the results, which must not exist or must be empty. With None, `DEFAULT_OUT` in the run
            folder is replaced.
        num_ranks: the number of ranks; None for the number of the run.
        overrides: settings of the form KEY=VALUE that replace those of the run.

    Raises:
        ConfigError: the run, or the steps that were asked for, cannot be repeated.
        RollMeshError: the replay failed.
    """
    check_is_run(folder)
    if out is None:
        out = folder / DEFAULT_OUT
        shutil.rmtree(out, ignore_errors=True)
    result = replay_run(folder, out, steps=steps, num_ranks=num_ranks, overrides=overrides, say=_say)
    _say(verdict(result))
    return 0 if result.is_identical else 1


def _say(line: str) -> None:
    print(line, flush=True)


def replay_run(
    folder: Path,
    out: Path,
    *,
    steps: StepRange = (None, None),
    num_ranks: int | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> ReplayResult:
    """Repeat steps of a run, and compare the results with those of the run. Runs an event loop of its own.

    Args:
        folder: the run folder.
        out: the folder for the results, which must not exist or must be empty.
        steps: the first and the last step.
        num_ranks: the number of ranks; None for the number of the run.
        overrides: settings of the form KEY=VALUE that replace those of the run.
        say: gets the lines for a person.

    Raises:
        ConfigError: the run still goes on, the steps that were asked for cannot be repeated, or ``out`` is not empty.
        ReplayError: a recorded batch is damaged, a group stands in two batches, or a step failed.
        DeadlineError: no step ended within `learner.silent_work_timeout_s`.
    """
    check_is_run(folder)
    folder, out = folder.resolve(), out.resolve()
    if used := [log for log in sorted((folder / "logs").glob("*.log")) if is_in_use(log)]:
        problem = f"the run still goes on: a process writes {used[0].name}"
        raise ConfigError(str(folder), problem, "repeat the run when it has ended")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("--out", f"{out} exists and is not empty", "name another folder, or delete it")
    changes = [*overrides, *([f"learner.num_ranks={num_ranks}"] if num_ranks is not None else [])]
    plan = plan_replay(folder, out, steps, changes)
    say(f"  {'replay':<11}{plan.describe()}")
    recorded = {int(line["step"]): line for line in JsonLines(folder / "metrics.jsonl").read()}
    report = _Report(recorded, say)
    for number, part in enumerate(plan.parts, 1):
        asyncio.run(_repeat(part, number, out, report))
    last = plan.steps[-1]
    weights = compare_export(folder, out, last)
    difference = report.difference if report.difference is not None or weights is None else weights.difference
    return ReplayResult(plan.steps, report.num_compared, weights is not None, difference, plan.group_ids, out)


def verdict(result: ReplayResult) -> str:
    """Return the last line of a replay: what is identical, or the first difference with both values."""
    steps = f"steps {result.steps[0]} to {result.steps[-1]}"
    if result.difference is not None:
        return f"  {'different':<11}{result.difference}"
    if not result.num_compared and not result.has_compared_weights:
        return f"  {'repeated':<11}{steps}; the run has no metrics and no export of them to compare"
    weights = ", and so are the weights" if result.has_compared_weights else ""
    return f"  {'identical':<11}{steps} are identical to the bit ({result.num_compared} compared){weights}"


class _Report:
    """The comparison of each repeated step with the run's, a line for each step."""

    def __init__(self, recorded: Mapping[int, Mapping[str, Any]], say: Callable[[str], None]) -> None:
        self._recorded = recorded
        self._say = say
        self._num_seen = 0
        self.num_compared = 0
        self.difference: Difference | None = None

    def read(self, out: Path) -> bool:
        """Compare the steps that were repeated since the last call. Return whether there were any."""
        lines = JsonLines(out / "metrics.jsonl").read()[self._num_seen :]
        for line in lines:
            recorded = self._recorded.get(int(line["step"]))
            difference = None
            if recorded is not None:
                self.num_compared += 1
                difference = compare_step(recorded, line)
            self.difference = self.difference or difference
            self._say(describe_step(recorded, line, difference))
        self._num_seen += len(lines)
        return bool(lines)


async def _repeat(part: ReplayPart, number: int, out: Path, report: _Report) -> None:
    """Run the learner of one part, and report its steps as they end."""
    file = out / f"part-{number}.json"
    part.write(file)
    config = load_mesh(Path(part.settings))
    command = [sys.executable, "-P", "-m", "rollmesh.cli", "replay", str(out), "--part", str(file)]
    has_ranks = config.learner.num_ranks > 1
    learner = ServiceProcess("the replay's learner", command, out / "replay.log", has_ranks=has_ranks)
    await learner.start()
    try:
        await _follow(learner, config, out, report)
    finally:
        await learner.stop(_STOP_S)
    report.read(out)
    if learner.exit_code != 0:
        raise ReplayError(learner.failure())


async def _follow(learner: ServiceProcess, config: MeshConfig, out: Path, report: _Report) -> None:
    """Wait until the learner ends. A step, or a line in its log, shows that it moves.

    Raises:
        DeadlineError: nothing moved for `learner.silent_work_timeout_s`.
    """
    limit_s = config.learner.silent_work_timeout_s
    log_size, moved_at = 0, time.monotonic()
    while learner.is_running:
        size = learner.log.stat().st_size
        if report.read(out) or size != log_size:
            log_size, moved_at = size, time.monotonic()
        if time.monotonic() - moved_at > limit_s:
            problem = f"no step ended within learner.silent_work_timeout_s = {limit_s:g} s"
            raise DeadlineError(f"{problem}; the log is {learner.log}")
        await asyncio.sleep(_POLL_S)
