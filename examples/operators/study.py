"""The demo over settings and seeds: runs what is missing, then writes a table and a picture.

::

    python examples/operators/study.py staleness                    # max_staleness 0, 1, 4
    python examples/operators/study.py algorithms --steps 40        # every preset of docs/algorithms.md
    python examples/operators/study.py objectives                   # staleness x correction x learning rate

Each seed has its own warm-up, data and order. All runs of a study train the same number of samples. A run that is
complete is not run again, so a study can be interrupted and extended.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
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
    """One row of a table: what is set, over the mesh file."""

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
        "dapo": ("training.epochs=3",),  # what is filtered is replaced from further passes over the data
    }
    return [Variant(name, (f"algorithm.type={name}", *more.get(name, ()))) for name in PRESETS]


def objectives_study() -> list[Variant]:
    """Small micro-batches make the learner the slower side, so that samples get as old as they may."""
    return [
        Variant(
            f"{objective}, max_staleness {eta}, lr {rate:g}",
            (
                f"training.max_staleness={eta}",
                f"learner.optimizer.lr={rate}",
                "learner.tokens_per_micro_batch=128",
                *settings,
            ),
        )
        for rate in (3e-4, 1e-3)
        for eta in (0, 1, 4, 8)
        for objective, settings in OBJECTIVES.items()
    ]


STUDIES = {
    "staleness": ("mesh.yaml", staleness_study),
    "algorithms": ("mesh-no-kl.yaml", algorithms_study),
    "objectives": ("mesh-no-kl.yaml", objectives_study),
}
"""Mesh file and rows of each study."""


def build(folder: Path, seed: int) -> None:
    """The seed's datasets and warmed-up model, unless they are there."""
    subprocess.run(
        [sys.executable, str(HERE / "build.py"), "--out", str(folder / f"seed{seed}"), "--seed", str(seed)], check=True
    )


def run_one(folder: Path, mesh_file: str, variant: Variant, seed: int, steps: int) -> Path:
    """One run of the mesh; returns its folder. A run that fails is reported and left incomplete."""
    name = f"{variant.slug}-seed{seed}"
    run = folder / "runs" / name
    if is_complete(run, steps):
        return run
    source = folder / f"seed{seed}"
    settings = {
        "run.name": name,
        "run.directory": folder / "runs",
        "run.seed": seed,
        "model.path": source / "model",
        "data.path": source / "data" / "train.jsonl",
        "evaluation.data.path": source / "data" / "heldout.jsonl",
        "evaluation.every_steps": 20,
        "training.steps": steps,
        "learner.checkpoint.should_export": "false",
    }
    command = [sys.executable, "-m", "rollmesh.cli", "up", str(HERE / mesh_file), "--overwrite"]
    for setting in (*(f"{key}={value}" for key, value in settings.items()), *variant.settings):
        command += ["--set", setting]
    if subprocess.run(command, check=False).returncode:
        print(f"error: {name} failed; see {run}", file=sys.stderr)
    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_complete(run: Path, steps: int) -> bool:
    evaluations = read_lines(run / "evaluations.jsonl")
    return (run / "report.md").exists() and bool(evaluations) and evaluations[-1]["step"] == steps


def mean_and_error(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def table(runs: dict[str, list[Path]]) -> str:
    """Held-out pass@1 by variant: mean and standard error over seeds, every seed's last, and how old samples were."""
    steps = [evaluation["step"] for evaluation in read_lines(next(iter(runs.values()))[0] / "evaluations.jsonl")]
    lines = [
        f"|  | {' | '.join(f'step {step}' for step in steps)} | last, by seed | samples by staleness |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for label, folders in runs.items():
        curves = [[e["pass_at_1"] for e in read_lines(folder / "evaluations.jsonl")] for folder in folders]
        cells = [mean_and_error(column) for column in zip(*curves, strict=True)]
        last = ", ".join(f"{curve[-1]:.3f}" for curve in curves)
        lines.append(f"| {label} | {' | '.join(cells)} | {last} | {staleness_shares(folders)} |")
    return "\n".join(lines) + "\n"


def staleness_shares(folders: Sequence[Path]) -> str:
    histogram: dict[int, int] = {}
    for folder in folders:
        for step in read_lines(folder / "metrics.jsonl"):
            for behind, count in step["staleness_histogram"].items():
                histogram[int(behind)] = histogram.get(int(behind), 0) + count
    total = sum(histogram.values())
    return ", ".join(f"{behind}: {count / total:.1%}" for behind, count in sorted(histogram.items()) if count)


def draw(runs: dict[str, list[Path]], path: Path) -> None:
    """Reward in training, one thin line a run, and the mean held-out pass@1, by variant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = plt.get_cmap("tab10" if len(runs) <= 10 else "turbo")(
        range(len(runs)) if len(runs) <= 10 else [i / len(runs) for i in range(len(runs))]
    )
    for color, (label, folders) in zip(colors, runs.items(), strict=True):
        for folder in folders:
            metrics = read_lines(folder / "metrics.jsonl")
            axes[0].plot([m["step"] for m in metrics], [m["reward/mean"] for m in metrics], color=color, lw=0.6)
        curves = [read_lines(folder / "evaluations.jsonl") for folder in folders]
        means = [statistics.mean(e["pass_at_1"] for e in column) for column in zip(*curves, strict=True)]
        axes[1].plot([e["step"] for e in curves[0]], means, color=color, marker="o", ms=3, lw=1.2, label=label)
    axes[0].set(title="Training reward (sampled)", xlabel="step", ylim=(0, 1))
    axes[1].set(title="Held-out pass@1 (greedy), mean over seeds", xlabel="step", ylim=(0, 1))
    axes[1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for models and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", help="labels of the rows to run; all by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        build(args.out, seed)
    mesh_file, variants = STUDIES[args.study]
    chosen = [variant for variant in variants() if not args.only or variant.label in args.only]
    runs = {v.label: [run_one(args.out, mesh_file, v, seed, args.steps) for seed in args.seeds] for v in chosen}
    whole = {
        label: complete
        for label, folders in runs.items()
        if (complete := [folder for folder in folders if is_complete(folder, args.steps)])
    }
    if not whole:
        raise SystemExit("error: no run is complete; see the messages above")
    text = table(whole)
    (args.out / f"{args.study}.md").write_text(text, encoding="utf-8")
    draw(whole, args.out / f"{args.study}.png")
    print(text)


if __name__ == "__main__":
    main()
