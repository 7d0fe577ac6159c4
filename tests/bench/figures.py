"""What a bench reports: a ratio against a baseline that was measured in the same run, and what lies behind it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what `--only` takes.
        title: what is compared with what, in a few words.
        goal: the ratio aimed at; None where there is none.
        better: whether the ratio should be at least or at most the goal.
        ratios: one for each repetition; empty where nothing was measured.
        details: further numbers, rates with their unit in the name.
        reason: why nothing was measured.
        reported: the ratio of totals, where that is fairer than the median of the repetitions.
    """

    name: str
    title: str
    goal: float | None
    better: Literal["at least", "at most"]
    ratios: Sequence[float]
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    reported: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.reported is not None:
            return self.reported
        return statistics.median(self.ratios) if self.ratios else None

    def as_json(self) -> dict[str, Any]:
        ratio = self.ratio
        is_reached = None
        if ratio is not None and self.goal is not None:
            is_reached = ratio >= self.goal if self.better == "at least" else ratio <= self.goal
        content: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "ratio": _rounded(ratio),
            "goal": self.goal,
            "better": self.better,
            "is_goal_reached": is_reached,
            "repetitions": len(self.ratios),
            "details": {key: _rounded(value) for key, value in self.details.items()},
        }
        if self.ratios:
            content |= {
                "min": _rounded(min(self.ratios)),
                "median": _rounded(statistics.median(self.ratios)),
                "max": _rounded(max(self.ratios)),
            }
        if self.reason:
            content["not_measured"] = self.reason
        return content


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired(num_pairs: int, baseline: Callable[[], float], ours: Callable[[], float]) -> list[tuple[float, float]]:
    """Measure in turns, so that what else the machine does falls upon both: (baseline, ours) for each pair."""
    return [(baseline(), ours()) for _ in range(num_pairs)]


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
