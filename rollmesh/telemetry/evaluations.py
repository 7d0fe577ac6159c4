"""The results of evaluation rounds in a run folder, by step: which step was the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rollmesh.telemetry.json_lines import JsonLines


def read_scores(folder: Path, metric: str) -> dict[int, float]:
    """Return a metric of each evaluated step; empty where the run has no evaluation yet, or no such metric.

    Args:
        folder: the run folder, with `evaluations.jsonl`.
        metric: a name in `evaluations.jsonl`, such as "pass_at_1".

    Raises:
        ConfigError: `evaluations.jsonl` cannot be read.
    """
    entries = JsonLines(folder / "evaluations.jsonl").read()
    return {entry["step"]: float(entry[metric]) for entry in entries if isinstance(entry.get(metric), int | float)}


def best_step(scores: Mapping[int, float], *, is_highest_best: bool) -> int | None:
    """Return the step with the best score, of equal scores the latest; None without any score.

    The scores 0.5, 0.7 and 0.7 of the steps 10, 20 and 30 give step 30, or step 10 where the lowest score is the best.
    """
    sign = 1 if is_highest_best else -1
    return max(scores, key=lambda step: (sign * scores[step], step), default=None)
