"""The results of a study: a record of each run, tables and pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Outcome:
    """The result of one run, small enough to be kept."""

    label: str
    seed: int
    steps: list[int]
    """The steps of the evaluations."""
    pass_at_1: list[float]
    """Greedy pass@1 on held-out prompts at each of `steps`."""
    reward: list[float]
    """The mean reward of the samples of each batch."""
    staleness: dict[int, int]
    """The number of trained samples by their staleness, in versions."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_complete(run: Path, steps: int) -> bool:
    """Return whether the folder of a run has the report and the evaluation after the last step."""
    evaluations = read_lines(run / "evaluations.jsonl")
    return (run / "report.md").exists() and bool(evaluations) and evaluations[-1]["step"] == steps


def read_outcome(run: Path, label: str, seed: int) -> Outcome:
    """Return the outcome of a complete run, from its folder."""
    evaluations, metrics = read_lines(run / "evaluations.jsonl"), read_lines(run / "metrics.jsonl")
    staleness = added({int(behind): count for behind, count in step["staleness_histogram"].items()} for step in metrics)
    return Outcome(
        label=label,
        seed=seed,
        steps=[evaluation["step"] for evaluation in evaluations],
        pass_at_1=[round(evaluation["pass_at_1"], 4) for evaluation in evaluations],
        reward=[round(step["reward/mean"], 4) for step in metrics],
        staleness=staleness,
    )


def added(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Return the sum of histograms, in the order of their keys."""
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return dict(sorted(total.items()))


def write_outcomes(outcomes: Iterable[Outcome], path: Path) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(asdict(outcome)) for outcome in outcomes]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes that `write_outcomes` wrote."""
    return [
        Outcome(**{**line, "staleness": {int(behind): count for behind, count in line["staleness"].items()}})
        for line in read_lines(path)
    ]


def by_label(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.label, []).append(outcome)
    return grouped


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean and its standard error: "0.500 ± 0.100" for 0.4 and 0.6, "nan" as error for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def staleness_shares(outcomes: Iterable[Outcome]) -> str:
    """Return the shares of samples by staleness, such as "0: 25.0%, 1: 75.0%"."""
    histogram = added(outcome.staleness for outcome in outcomes)
    total = sum(histogram.values())
    return ", ".join(f"{behind}: {count / total:.1%}" for behind, count in histogram.items() if count)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of held-out pass@1 and of staleness, one row for each label.

    A row has the mean and the standard error over seeds at each step, the last pass@1 of every seed, and the shares of
    samples by staleness.
    """
    steps = outcomes[0].steps
    lines = [
        f"|  | {' | '.join(f'step {step}' for step in steps)} | last, by seed | samples by staleness |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for label, group in by_label(outcomes).items():
        cells = [mean_and_error(column) for column in zip(*(outcome.pass_at_1 for outcome in group), strict=True)]
        last = ", ".join(f"{outcome.pass_at_1[-1]:.3f}" for outcome in group)
        lines.append(f"| {label} | {' | '.join(cells)} | {last} | {staleness_shares(group)} |")
    return "\n".join(lines) + "\n"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the reward in training with a thin line for each run, and the mean held-out pass@1 of each label."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    groups = by_label(outcomes)
    for color, (label, group) in zip(plt.get_cmap("tab10").colors, groups.items(), strict=False):
        for outcome in group:
            axes[0].plot(range(1, len(outcome.reward) + 1), outcome.reward, color=color, lw=0.6)
        means = [statistics.mean(column) for column in zip(*(outcome.pass_at_1 for outcome in group), strict=True)]
        axes[1].plot(group[0].steps, means, color=color, marker="o", ms=3, lw=1.2, label=label)
    axes[0].set(title="Training reward (sampled)", xlabel="step", ylim=(0, 1))
    axes[1].set(title="Held-out pass@1 (greedy), mean over seeds", xlabel="step", ylim=(0, 1))
    axes[1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Grid:
    """A study over three settings at once.

    Attributes:
        tables: the values of the first setting; each has a table of its own.
        columns: the values of the second setting; each name ends with the value.
        rows: the values of the third setting.
    """

    tables: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]

    def label(self, table: str, column: str, row: str) -> str:
        return f"{row}, {column}, {table}"

    def labels(self) -> list[tuple[str, str, str]]:
        return [(table, column, row) for table in self.tables for column in self.columns for row in self.rows]


def grid_table(outcomes: Sequence[Outcome], grid: Grid) -> str:
    """Return the tables of a grid.

    A cell has the held-out pass@1 after the last step, as mean and standard error over seeds, and the number of seeds
    that ended lower than they began. The last table has the shares of samples by staleness for each column.
    """
    groups = by_label(outcomes)
    lines = []
    for table in grid.tables:
        lines += [f"| {table} | {' | '.join(grid.columns)} |", "|---" * (len(grid.columns) + 1) + "|"]
        for row in grid.rows:
            cells = [grid_cell(groups.get(grid.label(table, column, row), [])) for column in grid.columns]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["|  | samples by staleness, all runs |", "|---|---|"]
    for column in grid.columns:
        runs = [
            outcome
            for table in grid.tables
            for row in grid.rows
            for outcome in groups.get(grid.label(table, column, row), [])
        ]
        lines.append(f"| {column} | {staleness_shares(runs)} |")
    return "\n".join(lines) + "\n"


def grid_cell(group: Sequence[Outcome]) -> str:
    """Return the last pass@1 of the seeds, and the number of seeds that ended lower than they began."""
    if not group:
        return "-"
    below = sum(outcome.pass_at_1[-1] < outcome.pass_at_1[0] for outcome in group)
    return mean_and_error([outcome.pass_at_1[-1] for outcome in group]) + (
        f" ({below} of {len(group)} collapsed)" if below else ""
    )


def draw_grid(outcomes: Sequence[Outcome], grid: Grid, path: Path) -> None:
    """Draw the reward in training, in a panel for each table and column.

    Each run has a thin line, and each mean over seeds has a thick line.
    """
    groups = by_label(outcomes)
    size = (3.1 * len(grid.columns), 2.9 * len(grid.tables) + 0.4)
    figure, axes = plt.subplots(
        len(grid.tables), len(grid.columns), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    colors = dict(zip(grid.rows, plt.get_cmap("tab10").colors, strict=False))
    for table, panels in zip(grid.tables, axes, strict=True):
        panels[0].set_ylabel("training reward")
        for column, axis in zip(grid.columns, panels, strict=True):
            axis.set_title(f"{column}, {table}", fontsize="medium")
            axis.set_ylim(0, 1)
            for row, color in colors.items():
                rewards = [outcome.reward for outcome in groups.get(grid.label(table, column, row), [])]
                for reward in rewards:
                    axis.plot(range(1, len(reward) + 1), reward, color=color, lw=0.4, alpha=0.5)
                means = [statistics.mean(step) for step in zip(*rewards, strict=False)]
                axis.plot(range(1, len(means) + 1), means, color=color, lw=1.6, label=row)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(grid.rows), frameon=False)
    figure.savefig(path, dpi=110)


def draw_grid_ends(outcomes: Sequence[Outcome], grid: Grid, path: Path) -> None:
    """Draw the held-out pass@1 after the last step over the columns: each mean over seeds as a line, each seed as a
    dot."""
    groups = by_label(outcomes)
    figure, axes = plt.subplots(
        1, len(grid.tables), figsize=(5.2 * len(grid.tables), 4), layout="constrained", sharey=True, squeeze=False
    )
    colors = plt.get_cmap("tab10").colors
    for axis, table in zip(axes[0], grid.tables, strict=True):
        for index, row in enumerate(grid.rows):
            places: Mapping[int, list[float]] = {
                x: [outcome.pass_at_1[-1] for outcome in group]
                for x, column in enumerate(grid.columns)
                if (group := groups.get(grid.label(table, column, row)))
            }
            aside = (index - (len(grid.rows) - 1) / 2) * 0.09
            for x, ends in places.items():
                axis.scatter([x + aside] * len(ends), ends, color=colors[index], s=12, alpha=0.6, linewidths=0)
            means = [statistics.mean(ends) for ends in places.values()]
            axis.plot([x + aside for x in places], means, color=colors[index], marker="_", ms=9, lw=1.3, label=row)
        name, values = zip(*(column.rsplit(maxsplit=1) for column in grid.columns), strict=True)
        axis.set(title=table, ylim=(0, 1), xlabel=name[0], xticks=range(len(values)), xticklabels=values)
    axes[0][0].set_ylabel("held-out pass@1 (greedy)")
    axes[0][0].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
