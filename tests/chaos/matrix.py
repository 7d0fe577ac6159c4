"""The kill matrix: which process is killed at which moment, and how the run has to go on afterwards.

A cell is one process and one moment. The cells are shared out to runs of a mesh: each run is hit several times, by
another process each time, so that a few runs cover many cells.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from services.launcher.chaos_moments import MOMENTS

TARGETS = (
    "coordinator",
    "rollout-0",
    "rollout-0:engine",
    "reward",
    "reference",
    "learner:rank-1",
    "learner",
    "redis",
    "up",
)
GOES_ON = frozenset(TARGETS) - {"up"}
"""The processes after whose death the run has to go on. After the death of any other process the run may also end, and
`rollmesh resume` goes on with it."""
WITHOUT_MEANING: dict[tuple[str, str], str] = {}
"""The cells that are left out, and why. Every process is alive at every moment, so that no cell is left out."""
HITS_PER_RUN = 4
FIRST_STEP = 1
"""The number of trained steps before the first hit of a run."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One process to kill, and the moment to kill it at."""

    target: str
    moment: str

    def __str__(self) -> str:
        return f"{self.target}@{self.moment}"


@dataclass(frozen=True, slots=True)
class Hit:
    """One kill in the plan of a run, after ``after_step`` trained steps."""

    cell: Cell
    after_step: int


def all_cells() -> list[Cell]:
    """Return every cell of the matrix that has a meaning, target by target."""
    cells = [Cell(target, moment) for target in TARGETS for moment in MOMENTS]
    return [cell for cell in cells if (cell.target, cell.moment) not in WITHOUT_MEANING]


def plan(cells: Sequence[Cell], seed: int) -> list[list[Hit]]:
    """Share cells out to runs. A run never kills one process twice, and kills once in each step.

    Returns:
        The hits of each run, in the order in which they are made.
    """
    left = list(cells)
    random.Random(seed).shuffle(left)
    runs: list[list[Cell]] = []
    for cell in left:
        for run in runs:
            if len(run) < HITS_PER_RUN and cell.target not in {other.target for other in run}:
                run.append(cell)
                break
        else:
            runs.append([cell])
    return [[Hit(cell, FIRST_STEP + place) for place, cell in enumerate(run)] for run in runs]


def part(seed: int, num_cells: int) -> list[Cell]:
    """Return a seeded choice of cells, the same for the same seed."""
    return random.Random(seed).sample(all_cells(), num_cells)
