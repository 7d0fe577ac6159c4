"""The file that keeps the results of all evaluation rounds."""

from __future__ import annotations

import time
from pathlib import Path

from rollmesh.telemetry.json_lines import JsonLines
from rollmesh.types import EvaluationResult


class EvaluationLog:
    """The file `evaluations.jsonl` in the run folder: one JSON object per finished round.

    Args:
        path: path of the file. The rounds of an earlier coordinator stay in the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)
        entries = self._file.read()
        self.steps: list[int] = [entry["step"] for entry in entries]
        """Steps of the rounds in the file."""
        elapsed_s = float(entries[-1].get("time/since_start_s", 0.0)) if entries else 0.0
        self._started = time.monotonic() - elapsed_s

    def cut(self, after_step: int) -> None:
        """Remove the rounds of steps after ``after_step``: a learner went back before those steps."""
        self._file.keep(lambda entry: entry["step"] <= after_step)

    def append(self, result: EvaluationResult, num_other_versions: int) -> None:
        """Append the result of a round as one line."""
        self._file.append(
            {
                "version": str(result.version),
                "step": result.step,
                "num_prompts": result.num_prompts,
                "num_failed": result.num_failed,
                "pass_at_1": result.pass_at_1,
                "pass_at_1_stderr": result.pass_at_1_stderr,
                "mean_generated_tokens": result.mean_generated_tokens,
                "truncation_rate": result.truncation_rate,
                "num_other_versions": num_other_versions,
                **result.details,
                "time/since_start_s": round(time.monotonic() - self._started, 3),
            }
        )
