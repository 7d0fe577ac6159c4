"""A mesh under fire: a real run that is hit by a plan of kills, is resumed where it has to be, and ends.

::

    rollmesh up ─► for each hit: wait for its moment ─► SIGKILL ─► the run goes on, or ends and is resumed
                                                                            │
                     next hit ◄── the next step is trained ◄────────────────┘
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rollmesh.aio.tether import tethered
from rollmesh.errors import ConfigError, DeadlineError
from services.launcher.chaos_actions import kill
from services.launcher.chaos_moments import MomentWatch
from services.launcher.chaos_processes import find_processes
from tests.chaos.matrix import GOES_ON, Cell, Hit
from tests.integration.mesh_runs import REPOSITORY, MeshRun, service_logs, start_mesh

NUM_STEPS = 8
GROUPS_PER_STEP = 8
SETTINGS = (
    f"training.steps={NUM_STEPS}",
    f"training.prompts_per_step={GROUPS_PER_STEP}",
    "training.samples_per_prompt=4",
    "evaluation.every_steps=4",
    "learner.checkpoint.every_steps=2",
    "learner.should_record_batches=true",
    "learner.num_ranks=2",
)
"""Two ranks, so that one of them can die."""
TIMEOUT_S = 300.0
"""The longest time from one hit to the next, with a resume and the starts of the engines."""
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Survival:
    """How a run got over one hit.

    Attributes:
        cell: the process that was killed, and the moment.
        is_resumed: whether the run ended, and `rollmesh resume` went on with it.
        standstill_s: seconds from the kill to the end of the next new step.
        lost_steps: steps that were trained before the kill, and were trained again after it.
    """

    cell: Cell
    is_resumed: bool
    standstill_s: float
    lost_steps: int


@dataclass(frozen=True)
class Ending:
    """A run that was hit and has ended.

    Attributes:
        run: the run.
        survivals: how it got over each hit, in their order.
        step_s: the median duration of a step, in seconds.
    """

    run: MeshRun
    survivals: tuple[Survival, ...]
    step_s: float


class MeshUnderFire:
    """One run of the demo with a tiny model.

    Args:
        demo: the folder with the demo's model and data.
        runs: the folder for the run folder.
        name: the name of the run.
    """

    def __init__(self, demo: Path, runs: Path, name: str) -> None:
        self.folder = runs / name
        self._log = runs / f"{name}.out"
        self._survivals: list[Survival] = []
        with self._log.open("ab") as output:
            overrides = [f"run.name={name}", *SETTINGS]
            self._process = start_mesh(demo, runs, overrides, output=output.fileno())

    def run(self, hits: Sequence[Hit]) -> Ending:
        """Make all hits, wait for the end of the run, and return it. No process is left, also after a failure."""
        try:
            for hit in hits:
                self._survive(hit)
            self._wait_for_end()
        except BaseException:
            self._end_all()
            raise
        run = MeshRun(self.folder, self._process.wait(), self.output())
        step_s = statistics.median(line["time/step_s"] for line in run.lines("metrics.jsonl"))
        return Ending(run, tuple(self._survivals), step_s)

    def output(self) -> str:
        """Return what `rollmesh up` and `rollmesh resume` printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _survive(self, hit: Hit) -> None:
        """Make one hit, and wait until the next step is trained."""
        asyncio.run(self._strike(hit))
        struck_at, step = time.monotonic(), self._num_steps() + 1
        self._survivals.append(Survival(hit.cell, is_resumed=False, standstill_s=0.0, lost_steps=0))
        num_lost = self._wait_for_step(step)
        standstill_s = time.monotonic() - struck_at
        self._survivals[-1] = replace(self._survivals[-1], standstill_s=standstill_s, lost_steps=num_lost)

    async def _strike(self, hit: Hit) -> None:
        """Wait for the moment of a hit, and kill its target."""
        while not await self._is_moment(hit):
            pass  # the run was resumed meanwhile, and its processes have other addresses
        assert kill(find_processes(self.folder).get(hit.cell.target, [])), self._problem(f"{hit.cell} hit nothing")

    async def _is_moment(self, hit: Hit) -> bool:
        """Wait for the moment of a hit. Return False if the run was resumed meanwhile."""
        process, watch = self._process, await self._watch()
        waiting = asyncio.create_task(watch.wait(hit.cell.moment, hit.after_step, TIMEOUT_S), name="moment")
        try:
            while not waiting.done():
                assert not self._is_over(), self._problem(f"the run ended before {hit.cell}")
                if self._process is not process:
                    return False
                await asyncio.wait({waiting}, timeout=_POLL_S)
            waiting.result()
        except DeadlineError as error:
            raise AssertionError(self._problem(str(error))) from error
        finally:
            waiting.cancel()
            await watch.close()
        return True

    async def _watch(self) -> MomentWatch:
        """Return a watch of the run, as soon as the run folder names the ports."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            assert not self._is_over(), self._problem("the run ended at once")
            assert time.monotonic() < deadline, self._problem("the run did not start in time")
            try:
                return MomentWatch(self.folder)
            except ConfigError:
                await asyncio.sleep(_POLL_S)

    def _is_over(self) -> bool:
        """Return whether the run has ended with success. Go on with a run that ended because of the last hit.

        The run may only end so if the process that was killed is not in `GOES_ON`, and only once for each hit.
        """
        code = self._process.poll()
        if code is None:
            return False
        if code != 0:
            what = f"the run ended with {code}"
            assert self._survivals, self._problem(f"{what} before the first hit")
            last = self._survivals[-1]
            assert last.cell.target not in GOES_ON, self._problem(f"{what} after {last.cell}")
            assert not last.is_resumed, self._problem(f"{what} although it was resumed after {last.cell}")
            self._survivals[-1] = replace(last, is_resumed=True)
            self._resume()
        return code == 0

    def _resume(self) -> None:
        """Go on with a run that ended, in another working directory than before."""
        command = [sys.executable, "-m", "rollmesh.cli", "resume", str(self.folder)]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                tethered(command),
                cwd=self.folder.parent,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def _wait_for_step(self, step: int) -> int:
        """Wait until ``step`` is trained, or until the run is over. Return how many steps were taken back meanwhile."""
        deadline, num_lost = time.monotonic() + TIMEOUT_S, 0
        while (num_steps := self._num_steps()) < step and not self._is_over():
            assert time.monotonic() < deadline, self._problem(f"step {step} did not come in {TIMEOUT_S:g} s")
            num_lost = max(num_lost, step - 1 - num_steps)
            time.sleep(_POLL_S)
        return num_lost

    def _num_steps(self) -> int:
        """Return the last step in `metrics.jsonl`; 0 before the first."""
        steps = [line.get("step", 0) for line in _whole_lines(self.folder / "metrics.jsonl")]
        return max(steps, default=0)

    def _wait_for_end(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self._is_over():
            assert time.monotonic() < deadline, self._problem("the run did not end")
            time.sleep(_POLL_S)

    def _problem(self, sentence: str) -> str:
        return f"{sentence}\n{self.output()}\n{service_logs(self.folder)}"

    def _end_all(self) -> None:
        """Kill the launcher and what it leaves behind."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(30)
        for processes in find_processes(self.folder).values():
            kill(processes)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that another process writes; a last line that is not whole is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
