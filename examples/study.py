"""Train the examples with several settings and seeds, then write a table and a picture.

::

    python examples/study.py staleness                        # operators: max_staleness 0, 1, 4
    python examples/study.py algorithms --steps 40            # operators: every preset of docs/algorithms.md
    python examples/study.py objectives --steps 40 --jobs 2   # operators: staleness x objective x learning rate
    python examples/study.py arithmetic --steps 16            # a real language model learns sums

Each seed has data and an order of its own, and in operators a warm-up of its own. All runs of a study train on the same
number of samples. A complete run is not run again, so a study can be interrupted and extended. The script writes
outcomes (.jsonl), tables (.md) and pictures (.png) beside the runs. ``--from outcomes.jsonl`` writes the tables and the
pictures again without a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from study_report import (
    Grid,
    Outcome,
    draw,
    draw_grid,
    draw_grid_ends,
    grid_table,
    is_complete,
    read_lines,
    read_outcome,
    read_outcomes,
    table,
    write_outcomes,
)

PRESETS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++-baseline", "ppo")
OBJECTIVES = {
    "no correction": ["algorithm.correction.type=none", "algorithm.correction.ratio=old"],
    "TIS": ["algorithm.correction.type=tis", "algorithm.correction.low=0", "algorithm.correction.high=2"],
    "clip against behaviour": ["algorithm.correction.type=none", "algorithm.correction.ratio=behaviour"],
    "decoupled": ["algorithm.correction.type=decoupled", "algorithm.correction.proximal=approximated"],
    "CISPO": ["algorithm.type=cispo", "algorithm.correction.type=none", "algorithm.correction.ratio=behaviour"],
}


@dataclass(frozen=True)
class Variant:
    """One row of a table: a label, and the settings that override the mesh file."""

    label: str
    settings: tuple[str, ...]

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.label).strip("-").lower()


def staleness_study() -> list[Variant]:
    return [Variant(f"max_staleness {eta}", (f"training.max_staleness={eta}",)) for eta in (0, 1, 4)]


def algorithms_study() -> list[Variant]:
    more = {
        "ppo": ("learner.critic.optimizer.lr=1e-3",),
        "dapo": ("training.epochs=3",),  # further passes over the data replace filtered groups
    }
    return [Variant(name, (f"algorithm.type={name}", *more.get(name, ()))) for name in PRESETS]


GRID = Grid(
    tables=("lr 0.0003", "lr 0.001"),
    columns=tuple(f"max_staleness {eta}" for eta in (0, 1, 4, 8)),
    rows=tuple(OBJECTIVES),
)
PROXIMAL_OF_FRESH_SAMPLES = {("decoupled", "max_staleness 0"): ("algorithm.correction.proximal=recomputed",)}
"""At max_staleness 0 samples have no age, by which the approximated policy interpolates."""


def objectives_study() -> list[Variant]:
    """Return the variants of the grid. Samples get as old as they may: workers take each slot as soon as it opens, and
    the engine takes many samples at a time, so that generation runs ahead of the learner."""
    return [
        Variant(
            GRID.label(rate, staleness, objective),
            (
                f"training.max_staleness={staleness.split()[1]}",
                f"learner.optimizer.lr={rate.split()[1]}",
                "learner.tokens_per_micro_batch=1024",
                "rollout.engine.max_num_seqs=512",
                "rollout.max_open_groups=320",
                *OBJECTIVES[objective],
                *PROXIMAL_OF_FRESH_SAMPLES.get((objective, staleness), ()),
            ),
        )
        for rate, staleness, objective in GRID.labels()
    ]


def arithmetic_study() -> list[Variant]:
    return [Variant("SmolLM2-135M-Instruct, GRPO", ())]


def report(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the table to `path`.md and print it, and write a picture to `path`.png."""
    text = table(outcomes)
    draw(outcomes, path.with_suffix(".png"))
    write_text(text, path)


def report_grid(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the tables of a grid to `path`.md, print them, and write pictures to `path`.png and `path`-curves.png."""
    text = grid_table(outcomes, GRID)
    draw_grid_ends(outcomes, GRID, path.with_suffix(".png"))
    draw_grid(outcomes, GRID, path.with_name(f"{path.name}-curves.png"))
    write_text(text, path)


def write_text(text: str, path: Path) -> None:
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


@dataclass(frozen=True)
class Study:
    """Runs to compare with each other."""

    mesh_file: str
    """The path of the mesh file in the examples; `build.py` beside the file makes a seed's model and data."""
    variants: Callable[[], list[Variant]]
    report: Callable[[Sequence[Outcome], Path], None] = report
    evaluate_every_steps: int = 20


STUDIES = {
    "staleness": Study("operators/mesh.yaml", staleness_study),
    "algorithms": Study("operators/mesh-no-kl.yaml", algorithms_study),
    "objectives": Study("operators/mesh-no-kl.yaml", objectives_study, report_grid),
    "arithmetic": Study("arithmetic/mesh.yaml", arithmetic_study, evaluate_every_steps=4),
}


def build(study: Study, folder: Path, seed: int) -> None:
    """Make the seed's datasets and model, unless they exist."""
    script = (HERE / study.mesh_file).with_name("build.py")
    subprocess.run([sys.executable, str(script), "--out", str(folder / f"seed{seed}"), "--seed", str(seed)], check=True)


def folder_of(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / "runs" / f"{variant.slug}-seed{seed}"


def run_one(folder: Path, study: Study, variant: Variant, seed: int, steps: int, *, is_alone: bool) -> None:
    """Run the mesh once, unless the run is complete. A run that fails is reported and stays incomplete.

    If other runs go on beside this run, its output goes to a file beside its folder, and OpenMP gets one thread.
    """
    run = folder_of(folder, variant, seed)
    if is_complete(run, steps):
        return
    source = folder / f"seed{seed}"
    settings = {
        "run.name": run.name,
        "run.directory": folder / "runs",
        "run.seed": seed,
        "model.path": source / "model",
        "data.path": source / "data" / "train.jsonl",
        "evaluation.data.path": source / "data" / "heldout.jsonl",
        "evaluation.every_steps": study.evaluate_every_steps,
        "training.steps": steps,
        "learner.checkpoint.should_export": "false",
    }
    command = [sys.executable, "-m", "rollmesh.cli", "up", str(HERE / study.mesh_file), "--overwrite"]
    for setting in (*(f"{key}={value}" for key, value in settings.items()), *variant.settings):
        command += ["--set", setting]
    log = None if is_alone else run.with_suffix(".log")
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") if log else nullcontext() as output:
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if log else {})
        code = subprocess.run(
            command, check=False, stdout=output, stderr=subprocess.STDOUT if log else None, env=environment
        ).returncode
    if code:
        print(f"error: {run.name} failed; see {log or run}", file=sys.stderr, flush=True)
    elif log:
        last = read_lines(run / "evaluations.jsonl")[-1]["pass_at_1"]
        print(f"{run.name}: pass@1 {last:.3f}, {time.monotonic() - started:.0f} s", flush=True)


def run_all(
    folder: Path, study: Study, variants: Sequence[Variant], seeds: Sequence[int], steps: int, jobs: int
) -> None:
    """Run all missing runs, seed by seed, so that an interrupted study has about as many runs for each row."""
    for seed in seeds:
        build(study, folder, seed)
    (folder / "runs").mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(run_one, folder, study, variant, seed, steps, is_alone=jobs == 1)
            for seed in seeds
            for variant in variants
        ]
        for run in running:
            run.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for models, runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; each wants a core and 4 GiB")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="labels of the rows to run; all by default")
    parser.add_argument(
        "--from", dest="stored", type=Path, metavar="FILE", help="outcomes to report on, in place of runs"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = STUDIES[args.study]
    labels = [variant.label for variant in study.variants()]
    if unknown := set(args.only or ()) - set(labels):
        parser.error(f"--only: no row is called {sorted(unknown)}; there are {labels}")
    if args.stored:
        outcomes = read_outcomes(args.stored)
    else:
        variants = [variant for variant in study.variants() if not args.only or variant.label in args.only]
        run_all(args.out, study, variants, args.seeds, args.steps, args.jobs)
        outcomes = [
            read_outcome(run, variant.label, seed)
            for variant in variants
            for seed in args.seeds
            if is_complete(run := folder_of(args.out, variant, seed), args.steps)
        ]
        write_outcomes(outcomes, args.out / f"{args.study}.jsonl")
    if not outcomes:
        raise SystemExit("error: no run is complete; see the messages above")
    study.report(outcomes, args.out / args.study)


if __name__ == "__main__":
    main()
