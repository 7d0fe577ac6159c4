"""The whole kill matrix, or a part of it, with a table of the results for docs/chaos.md.

::

    python -m tests.chaos.run                                   # all cells, and the table is written
    python -m tests.chaos.run --part 10 --seed 3                # ten cells that the seed chooses
    python -m tests.chaos.run --cells redis@transfer,up@leased  # these cells

A run that fails is repeated with each of its hits alone, so that the table names the cell at fault. What a failed run
printed is in ``build/chaos``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.launcher.chaos_moments import MOMENTS
from tests.chaos.checks import check_run
from tests.chaos.fire import GROUPS_PER_STEP, NUM_STEPS, MeshUnderFire
from tests.chaos.matrix import TARGETS, Cell, Hit, all_cells, part, plan
from tests.chaos.witness import TOLERANCE, difference
from tests.integration.mesh_runs import REPOSITORY, build_demo_model

PAGE = REPOSITORY / "docs" / "chaos.md"
BEGIN, END = "<!-- kill matrix: begin -->\n", "<!-- kill matrix: end -->\n"
PROBLEMS = REPOSITORY / "build" / "chaos"


def run_hits(demo: Path, runs: Path, name: str, hits: Sequence[Hit]) -> dict[Cell, str]:
    """Run one mesh under fire, and check it. Return the result of each cell.

    Raises:
        AssertionError: the run did not survive, or lost or repeated something.
    """
    ending = MeshUnderFire(demo, runs, name).run(hits)
    check_run(ending.run, NUM_STEPS, GROUPS_PER_STEP)
    found = difference(ending.run, runs / f"{name}-repeated")
    assert found <= TOLERANCE, f"the weights differ by {found:g} from those that the recorded batches give"
    results = {}
    for survival in ending.survivals:
        how = "resumed" if survival.is_resumed else "goes on"
        lost = f", {survival.lost_steps} trained again" if survival.lost_steps else ""
        results[survival.cell] = f"{how}, {survival.standstill_s / ending.step_s:.0f} steps{lost}"
    return results


def run_matrix(demo: Path, runs: Path, plans: Sequence[Sequence[Hit]]) -> dict[Cell, str]:
    """Run all plans. Return the result of each cell; "FAULT" for a cell whose run failed."""
    results: dict[Cell, str] = {}
    left = deque(list(hits) for hits in plans)
    number = 0
    while left:
        hits, number = left.popleft(), number + 1
        name = f"run-{number}"
        print(f"{name}: {', '.join(str(hit.cell) for hit in hits)}", flush=True)
        try:
            results |= run_hits(demo, runs, name, hits)
            for hit in hits:
                print(f"  {hit.cell}: {results[hit.cell]}", flush=True)
        except AssertionError as error:
            PROBLEMS.mkdir(parents=True, exist_ok=True)
            (PROBLEMS / f"{name}.txt").write_text(str(error), encoding="utf-8")
            print(f"  FAULT: {str(error).splitlines()[0]}; see {PROBLEMS / name}.txt", flush=True)
            if len(hits) == 1:
                results[hits[0].cell] = "FAULT"
            else:
                left.extend([hit] for hit in hits)
    return results


def table(results: Mapping[Cell, str]) -> str:
    """Return the results as a table of Markdown, with a row for each process and a column for each moment."""
    lines = [f"| killed | {' | '.join(MOMENTS)} |", f"|---{'|---' * len(MOMENTS)}|"]
    for target in TARGETS:
        cells = [results.get(Cell(target, moment), "not run") for moment in MOMENTS]
        lines.append(f"| `{target}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(results: Mapping[Cell, str]) -> None:
    """Replace the table in docs/chaos.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that the command line names. Return 1 if one of them is at fault."""
    parser = argparse.ArgumentParser(description="Kill processes of real meshes at chosen moments.")
    parser.add_argument("--seed", type=int, default=1, help="shares the cells out to runs, and chooses the part")
    parser.add_argument("--part", type=int, help="number of cells to choose; all by default")
    parser.add_argument("--cells", default="", help="cells to run, e.g. redis@transfer,up@leased")
    args = parser.parse_args(arguments)
    named = [Cell(*name.split("@")) for name in args.cells.split(",") if name]
    cells = named or (part(args.seed, args.part) if args.part else all_cells())
    if unknown := [str(cell) for cell in cells if cell not in all_cells()]:
        parser.error(f"no such cell: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="rollmesh-chaos-") as folder:
        demo = build_demo_model(Path(folder) / "demo")
        results = run_matrix(demo, Path(folder), plan(cells, args.seed))
    if cells == all_cells():
        write_table(results)
    print(table(results))
    return int("FAULT" in results.values())


if __name__ == "__main__":
    sys.exit(main())
