"""The plan of a replay: where it starts, and which steps have the same settings and can be repeated by one learner.

::

    asked for:   steps 5 to 9
    recorded:    1  2  3  4  5  6  7  8  9        checkpoint after step 3, resumed with another learning rate after 7
    plan:                 └─part 1───┘  └─part 2─┘

A replay starts from the newest checkpoint before its first step, or from the initial model; the steps in between are
repeated as well. Where the settings change, the run was started anew from a checkpoint, and so is the replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollmesh.errors import ConfigError, ReplayError
from rollmesh.replay.recording import RecordedStep, read_facts, recorded_paths
from rollmesh.replay.replay_part import ReplayPart
from rollmesh.telemetry.whole_file import write_whole
from services.config import dump_mesh, load_mesh
from services.launcher.run_folder import complete_checkpoints

BATCHES = "batches"

StepRange = tuple[int | None, int | None]
"""The first and the last step; None stands for the first or the last recorded step."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """The steps of a replay, and its parts.

    Attributes:
        steps: the steps that are repeated; the steps between the start and the first step asked for are among them.
        num_ranks: the numbers of ranks that trained these steps.
        parts: the parts, in their order.
        group_ids: the ids of the groups of each step.
    """

    steps: range
    num_ranks: frozenset[int]
    parts: Sequence[ReplayPart]
    group_ids: Mapping[int, Sequence[str]]

    def describe(self) -> str:
        """Return the plan as one line for a person."""
        start = f"the checkpoint of step {self.steps[0] - 1}" if self.parts[0].start else "the initial model"
        ranks = " and ".join(map(str, sorted(self.num_ranks)))
        return f"steps {self.steps[0]} to {self.steps[-1]} from {start} · trained on {ranks} rank(s)"


def plan_replay(folder: Path, out: Path, asked: StepRange, overrides: Sequence[str]) -> ReplayPlan:
    """Plan a replay, and write the mesh file of each part to ``out``.

    Args:
        folder: the run folder, absolute.
        out: the folder for the results, absolute. It is made where it does not exist.
        asked: the first and the last step.
        overrides: settings of the form KEY=VALUE that replace those of the run.

    Raises:
        ConfigError: these steps cannot be repeated, or a setting has a fault.
        ReplayError: a recorded batch is damaged, or a group stands in two batches.
    """
    paths = recorded_paths(folder / BATCHES)
    steps = choose_steps(list(paths), list(complete_checkpoints(folder)), asked)
    facts: dict[int, RecordedStep] = {}
    group_ids: dict[int, Sequence[str]] = {}
    for step in steps:
        facts[step], group_ids[step] = read_facts(paths[step])
    check_once(group_ids)
    out.mkdir(parents=True, exist_ok=True)
    parts, bounds = [], _boundaries([facts[step] for step in steps])
    for first, last in bounds:
        is_start = first == steps[0]
        start = folder if is_start else out
        parts.append(
            ReplayPart(
                batches=str(folder / BATCHES),
                first=first,
                last=last,
                settings=str(_write_settings(facts[first], out, overrides)),
                start=str(start) if first > 1 else "",
                out=str(out),
                is_last=last == steps[-1],
            )
        )
    return ReplayPlan(steps, frozenset(fact.num_ranks for fact in facts.values()), parts, group_ids)


def choose_steps(recorded: Sequence[int], saved: Sequence[int], asked: StepRange) -> range:
    """Return the steps to repeat.

    Steps 1 to 9 are recorded, and a checkpoint of step 3 exists: (5, 7) gives 4 to 7, and (2, 7) gives 1 to 7.

    Args:
        recorded: the steps with a recorded batch, ascending.
        saved: the steps of the complete checkpoints.
        asked: the first and the last step.

    Raises:
        ConfigError: a step is not recorded, or there is nothing to start from.
    """
    if not recorded:
        fix = "set learner.should_record_batches: true before the run"
        raise ConfigError("learner.should_record_batches", f"was not set: the run has no {BATCHES}/", fix)
    first = recorded[0] if asked[0] is None else asked[0]
    last = recorded[-1] if asked[1] is None else asked[1]
    if not recorded[0] <= first <= last <= recorded[-1]:
        problem = f"{first}:{last} is not among the recorded steps {recorded[0]} to {recorded[-1]}"
        raise ConfigError("--steps", problem, f"ask for steps in {recorded[0]}:{recorded[-1]}")
    start = max((step for step in (0, *saved) if step < first), default=0)
    missing = sorted(set(range(start + 1, last + 1)).difference(recorded))
    if missing:
        source = f"the checkpoint of step {start}" if start else "the initial model"
        problem = f"{first}:{last} needs step {missing[0]}, which is not recorded; the newest start before is {source}"
        starts = ", ".join(str(step + 1) for step in saved if step + 1 in recorded)
        fix = f"begin with a step after a checkpoint: {starts}" if starts else "record a whole run"
        raise ConfigError("--steps", problem, fix)
    return range(start + 1, last + 1)


def check_once(group_ids: Mapping[int, Sequence[str]]) -> None:
    """Refuse recordings in which a group was trained twice.

    Raises:
        ReplayError: names the group and both steps.
    """
    step_of: dict[str, int] = {}
    for step, ids in group_ids.items():
        for group_id in ids:
            if group_id in step_of:
                raise ReplayError(f"group {group_id} stands in the batches of step {step_of[group_id]} and step {step}")
            step_of[group_id] = step


def _boundaries(facts: Sequence[RecordedStep]) -> list[tuple[int, int]]:
    """Return the first and the last step of each stretch of steps with the same settings."""
    firsts = [
        fact.step
        for before, fact in zip([None, *facts], facts, strict=False)
        if before is None
        or (before.settings, before.num_ranks, before.num_batches) != (fact.settings, fact.num_ranks, fact.num_batches)
    ]
    lasts = [first - 1 for first in firsts[1:]] + [facts[-1].step]
    return list(zip(firsts, lasts, strict=True))


def _write_settings(facts: RecordedStep, out: Path, overrides: Sequence[str]) -> Path:
    """Write the mesh file of the part that begins with a step, and return its path.

    The parity check is off: it compares the first batch of a process, and says nothing about the learner's arithmetic.
    """
    path = out / f"settings-{facts.step:06d}.yaml"
    write_whole(path, facts.settings)
    ranks = f"learner.num_ranks={facts.num_ranks}"
    config = load_mesh(path, [ranks, "learner.parity=off", *overrides])
    write_whole(path, dump_mesh(config))
    return path
