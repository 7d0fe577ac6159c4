"""The demo over seeds and over `max_staleness`: runs what is missing, then writes a table and a picture.

::

    python examples/operators/study.py --staleness 0 1 4 --seeds 1 2 3

Each seed has its own warm-up, data and order. All runs train the same number of samples. A run that is complete is not
run again, so the study can be interrupted and extended.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def build(folder: Path, seed: int) -> None:
    """The seed's datasets and warmed-up model, unless they are there."""
    subprocess.run(
        [sys.executable, str(HERE / "build.py"), "--out", str(folder / f"seed{seed}"), "--seed", str(seed)], check=True
    )


def run_one(folder: Path, staleness: int, seed: int, steps: int) -> Path:
    """One run of the mesh; returns its folder."""
    name = f"seed{seed}-staleness{staleness}"
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
        "training.max_staleness": staleness,
    }
    command = [sys.executable, "-m", "rollmesh.cli", "up", str(HERE / "mesh.yaml"), "--overwrite"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, check=True)
    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_complete(run: Path, steps: int) -> bool:
    evaluations = read_lines(run / "evaluations.jsonl")
    return (run / "report.md").exists() and bool(evaluations) and evaluations[-1]["step"] == steps


def mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def table(runs: dict[int, list[Path]]) -> str:
    """Held-out pass@1 by `max_staleness`: mean and standard error over seeds, and where the samples came from."""
    first = next(iter(runs.values()))[0]
    steps = [evaluation["step"] for evaluation in read_lines(first / "evaluations.jsonl")]
    lines = [
        f"| max_staleness | seeds | {' | '.join(f'step {step}' for step in steps)} | samples by staleness |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for staleness, folders in runs.items():
        curves = [[e["pass_at_1"] for e in read_lines(folder / "evaluations.jsonl")] for folder in folders]
        cells = [mean_and_error(list(column)) for column in zip(*curves, strict=True)]
        histogram: dict[int, int] = {}
        for folder in folders:
            for step in read_lines(folder / "metrics.jsonl"):
                for behind, count in step["staleness_histogram"].items():
                    histogram[int(behind)] = histogram.get(int(behind), 0) + count
        total = sum(histogram.values())
        shares = ", ".join(f"{behind}: {count / total:.1%}" for behind, count in sorted(histogram.items()))
        lines.append(f"| {staleness} | {len(folders)} | {' | '.join(cells)} | {shares} |")
    lines += ["", "| max_staleness | seed | first | last |", "|---|---|---|---|"]
    for staleness, folders in runs.items():
        for folder in folders:
            evaluations = read_lines(folder / "evaluations.jsonl")
            seed = folder.name.partition("-")[0].removeprefix("seed")
            scores = f"{evaluations[0]['pass_at_1']:.3f} | {evaluations[-1]['pass_at_1']:.3f}"
            lines.append(f"| {staleness} | {seed} | {scores} |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[int, list[Path]], path: Path) -> None:
    """Reward in training, one thin line a run, and held-out pass@1 with its mean, by `max_staleness`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for color, (staleness, folders) in zip(["#2c7a51", "#2e86c1", "#c0392b", "#7d5ba6"], runs.items(), strict=False):
        for index, folder in enumerate(folders):
            label = f"max_staleness {staleness}" if index == 0 else None
            metrics = read_lines(folder / "metrics.jsonl")
            rewards = [m["reward/mean"] for m in metrics]
            axes[0].plot([m["step"] for m in metrics], rewards, color=color, lw=0.8, alpha=0.8, label=label)
            evaluations = read_lines(folder / "evaluations.jsonl")
            scores = [e["pass_at_1"] for e in evaluations]
            axes[1].plot([e["step"] for e in evaluations], scores, color=color, marker="o", ms=3, lw=0.8, label=label)
    axes[0].set(title="Training reward (sampled)", xlabel="step", ylim=(0, 1))
    axes[1].set(title="Held-out pass@1 (greedy)", xlabel="step", ylim=(0, 1))
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for models and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        build(args.out, seed)
    runs = {eta: [run_one(args.out, eta, seed, args.steps) for seed in args.seeds] for eta in args.staleness}
    text = table(runs)
    (args.out / "study.md").write_text(text, encoding="utf-8")
    draw(runs, args.out / "study.png")
    print(text)


if __name__ == "__main__":
    main()
