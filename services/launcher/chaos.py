"""`rollmesh chaos`: kill, freeze or slow down a process of a running mesh, on purpose or at random with a seed.

::

    command ─► strikes ─► for each strike: wait for its time or moment ─► find the processes ─► act, and print a line
                                                                                                     │
    summary ◄────────────────────────────────────────────────────────────────────────────────────────┘

Only processes of the run in the named folder are touched. The run goes on as it can: docs/recovery.md says which
process may die, and docs/chaos.md describes a drill.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rollmesh.aio import stop_signals
from rollmesh.errors import ConfigError
from services.launcher.chaos_actions import freeze, kill, slow
from services.launcher.chaos_moments import MomentWatch
from services.launcher.chaos_processes import PROC, FoundProcess, find_processes
from services.launcher.run_folder import check_is_run

EXIT_OK, EXIT_FAILED = 0, 1
ACTIONS = ("kill", "freeze", "slow")
LONGEST_WAIT_S = 600.0
"""The longest time to wait for a moment."""
SLOWEST = 10.0
"""The largest factor of a slow-down that is drawn at random."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One action on one process of the mesh.

    Attributes:
        name: the name of the process, as `chaos_processes` gives it.
        action: "kill", "freeze" or "slow".
        duration_s: seconds for which the process is frozen or slow; 0 for a kill.
        factor: how many times slower the process runs; 0 for the other actions.
        wait_s: seconds to wait before the strike.
        moment: the moment for which the strike waits after that; empty for none.
        after_step: the number of steps that have to be trained before.
    """

    name: str
    action: str
    duration_s: float = 0.0
    factor: float = 0.0
    wait_s: float = 0.0
    moment: str = ""
    after_step: int = 0

    def __str__(self) -> str:
        if self.action == "kill":
            return f"kill {self.name}"
        how = f"{self.factor:.1f} times slower for " if self.action == "slow" else "for "
        return f"{self.action} {self.name} {how}{self.duration_s:.1f} s"


def draw(names: Sequence[str], seed: int, every_s: float, total_s: float) -> list[Strike]:
    """Return random strikes, which the seed and the arguments determine.

    The pause before a strike is ``every_s`` times a number between 0.5 and 1.5. A freeze or a slow-down takes between a
    tenth and a half of ``every_s``. No strike ends after ``total_s``.
    """
    chosen, end_s = random.Random(seed), 0.0
    strikes: list[Strike] = []
    while True:
        wait_s = every_s * chosen.uniform(0.5, 1.5)
        name, action = chosen.choice(sorted(names)), chosen.choice(ACTIONS)
        duration_s = 0.0 if action == "kill" else every_s * chosen.uniform(0.1, 0.5)
        factor = chosen.uniform(2.0, SLOWEST) if action == "slow" else 0.0
        end_s += wait_s + duration_s
        if end_s > total_s:
            return strikes
        strikes.append(Strike(name, action, duration_s, factor, wait_s))


def show(folder: Path) -> int:
    """Print the processes of the run that can be struck. Return the exit code."""
    found = _require_run(folder)
    for name, processes in found.items():
        print(f"{name:<18}pid {', '.join(str(process.pid) for process in processes)}")
    return EXIT_OK


def strike(folder: Path, planned: Strike, *, is_dry_run: bool) -> int:
    """Make one strike. Return the exit code: 1 where the process ended before the strike."""
    _require_names(_require_run(folder), [planned.name])
    return Chaos(folder, is_dry_run=is_dry_run).run([planned])


def strike_at_random(
    folder: Path, names: Sequence[str], *, seed: int, every_s: float, total_s: float, is_dry_run: bool
) -> int:
    """Make random strikes until their time is over, the run ends, or a signal comes. Return the exit code.

    Args:
        folder: the run folder.
        names: the processes to choose from; empty for all that run now, except `rollmesh up` itself.
        seed: determines all strikes, together with the other arguments.
        every_s: mean seconds between two strikes.
        total_s: seconds after which no strike goes on.
        is_dry_run: whether the strikes are only printed.

    Raises:
        ConfigError: the run does not go on, or a name has no process.
    """
    found = _require_run(folder)
    _require_names(found, names)
    chosen = names or [name for name in found if name != "up"]
    print(f"seed {seed}, among {', '.join(sorted(chosen))}", flush=True)
    return Chaos(folder, is_dry_run=is_dry_run).run(draw(chosen, seed, every_s, total_s))


class Chaos:
    """The strikes on one run, with a line for each and a summary.

    Args:
        folder: the run folder.
        is_dry_run: whether the strikes are printed, and neither made nor waited for.
    """

    def __init__(self, folder: Path, *, is_dry_run: bool) -> None:
        self._folder = folder
        self._is_dry_run = is_dry_run
        self._counts: Counter[str] = Counter()
        self._num_hits = 0
        self._signal = 0

    def run(self, strikes: Sequence[Strike]) -> int:
        """Make the strikes in their order, and print the summary.

        The signals that end a process are blocked meanwhile, and only taken in a pause. Therefore no signal comes
        between the stop of a process and the end of the stop.

        Returns:
            The exit code: 128 + the number of a signal that ended the command; 1 if no strike hit a process.
        """
        former = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        try:
            for planned in strikes:
                if not self._wait(planned) or not self._strike(planned):
                    break
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        self._summarise()
        if self._signal:
            return 128 + self._signal
        return EXIT_OK if self._num_hits or not strikes else EXIT_FAILED

    def _pause(self, duration_s: float) -> bool:
        """Wait for some seconds, or until a signal comes. Return whether a signal has come."""
        if not self._signal and (received := signal.sigtimedwait(stop_signals(), duration_s)) is not None:
            self._signal = received.si_signo
        return self._signal != 0

    def _wait(self, planned: Strike) -> bool:
        """Wait until the strike is due. Return False if a signal came first."""
        if self._is_dry_run:
            return True
        if self._pause(planned.wait_s):
            return False
        if planned.moment or planned.after_step:
            asyncio.run(self._until_moment(planned))
        return not self._pause(0.0)

    async def _until_moment(self, planned: Strike) -> None:
        """Wait for the moment of a strike, for the end of the run, or for a signal, whichever comes first.

        Raises:
            DeadlineError: the moment did not come within `LONGEST_WAIT_S`.
        """
        watch = MomentWatch(self._folder)
        waiting = asyncio.create_task(watch.wait(planned.moment, planned.after_step, LONGEST_WAIT_S), name="moment")
        try:
            while find_processes(self._folder) and not self._pause(0.0):
                if (await asyncio.wait({waiting}, timeout=0.5))[0]:
                    waiting.result()
                    return
        finally:
            waiting.cancel()
            await watch.close()

    def _strike(self, planned: Strike) -> bool:
        """Make one strike. Return False where the run is over."""
        found = find_processes(self._folder)
        if not found:
            print("the run is over", flush=True)
            return False
        processes = found.get(planned.name, [])
        if not processes:
            self._say(f"{planned}: skipped, because {planned.name} does not run now")
            return True
        if self._is_dry_run:
            self._num_hits += 1
            self._say(f"would {planned} (pid {_pids(processes)})")
            return True
        if planned.action != "kill":
            self._say(f"{planned} (pid {_pids(processes)})")
        num_alive = self._act(planned, processes)
        if planned.action == "kill":
            self._say(f"{planned} (pid {_pids(processes)}){'' if num_alive else ': it had ended already'}")
        elif not num_alive:
            self._say(f"{planned.name} ended meanwhile")
        self._num_hits += num_alive > 0
        self._counts[planned.action] += 1
        return True

    def _act(self, planned: Strike, processes: Sequence[FoundProcess]) -> int:
        if planned.action == "kill":
            return kill(processes)
        if planned.action == "freeze":
            return freeze(processes, planned.duration_s, self._pause)
        return slow(processes, planned.factor, planned.duration_s, self._pause)

    def _say(self, sentence: str) -> None:
        print(f"{datetime.now().isoformat(sep=' ', timespec='milliseconds')}  {sentence}", flush=True)

    def _summarise(self) -> None:
        counts = ", ".join(f"{count} {action}" for action, count in sorted(self._counts.items()))
        ending = f", ended by {signal.Signals(self._signal).name}" if self._signal else ""
        noun = "strike" if self._counts.total() == 1 else "strikes"
        print(f"{self._counts.total()} {noun}{f' ({counts})' if counts else ''}{ending}", flush=True)


def _pids(processes: Sequence[FoundProcess]) -> str:
    return ", ".join(str(process.pid) for process in processes)


def _require_run(folder: Path) -> dict[str, list[FoundProcess]]:
    """Return the processes of a run that goes on.

    Raises:
        ConfigError: this system has no /proc, or no process of the run in ``folder`` runs here.
    """
    check_is_run(folder)
    if not (PROC / "self" / "stat").exists():
        raise ConfigError("rollmesh chaos", "needs /proc, which this system does not have", "use Linux")
    found = find_processes(folder)
    if not found:
        raise ConfigError(
            str(folder), "has no process of yours on this machine", "name the folder of a run in progress"
        )
    return found


def _require_names(found: dict[str, list[FoundProcess]], names: Sequence[str]) -> None:
    for name in names:
        if name not in found:
            raise ConfigError(
                "rollmesh chaos", f"no process of the run is called {name!r}", f"choose {', '.join(found)}"
            )
