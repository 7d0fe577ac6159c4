"""The comparison of a repeated step with the run's own: metrics to the bit, the weights of the export byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.replay.accounting import EndState
from rollmesh.telemetry.json_lines import JsonLines
from services.launcher.outcome import ACCOUNTING, read_json

LOSS = "policy/loss"
NOT_REPEATED = ("time/", "parity/", "filter/", "report/")
"""The first letters of metrics that do not follow from batches and weights."""
_NUM_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """The first value that differs between a run and its replay.

    Attributes:
        step: the step after which the values differ.
        name: the metric, or the file of the export.
        recorded: the value of the run; of a file, the first digits of its SHA-256.
        repeated: the value of the replay.
    """

    step: int
    name: str
    recorded: object
    repeated: object

    def __str__(self) -> str:
        return f"step {self.step}, {self.name}: recorded {self.recorded!r}, repeated {self.repeated!r}"


@dataclass(frozen=True, slots=True)
class WeightComparison:
    """The comparison of two exports; ``difference`` is None where all files with weights are the same."""

    difference: Difference | None


def compare_step(recorded: Mapping[str, Any], repeated: Mapping[str, Any]) -> Difference | None:
    """Return the first metric of a step that differs, the loss first; None where all are the same to the bit.

    JSON holds the shortest decimal number that gives the same 64 bits, so equal numbers are equal to the bit.

    Args:
        recorded: the step's line in the run's `metrics.jsonl`.
        repeated: the step's line in the replay's `metrics.jsonl`.
    """
    for name in sorted(recorded.keys() & repeated.keys(), key=lambda name: (name != LOSS, name)):
        if not name.startswith(NOT_REPEATED) and recorded[name] != repeated[name]:
            return Difference(int(repeated["step"]), name, recorded[name], repeated[name])
    return None


def describe_step(
    recorded: Mapping[str, Any] | None, repeated: Mapping[str, Any], difference: Difference | None
) -> str:
    """Return the line of a step for a person."""
    loss, step = repeated.get(LOSS, "-"), f"step {repeated['step']}"
    if recorded is None:
        return f"  {step:<11}{LOSS} {loss!r}; the run has no metrics of this step"
    outcome = "same" if difference is None else f"different: {difference.name}"
    return f"  {step:<11}{LOSS} recorded {recorded.get(LOSS, '-')!r}  repeated {loss!r}  {outcome}"


def compare_export(folder: Path, out: Path, step: int) -> WeightComparison | None:
    """Compare the weights of the run after a step with the replay's; None where the run has no export of the step.

    Args:
        folder: the run folder.
        out: the folder of the replay, with `export`.
        step: the last repeated step.
    """
    export = _export_of(folder, step)
    if export is None:
        return None
    for path in sorted(export.rglob("*.safetensors")):
        name = path.relative_to(export)
        digests = [_digest(path), _digest(out / "export" / name)]
        if digests[0] != digests[1]:
            return WeightComparison(Difference(step, f"export/{name}", *digests))
    return WeightComparison(None)


def _export_of(folder: Path, step: int) -> Path | None:
    """Return the run's export after a step. The folder `export` is that of the last step of a run that is complete."""
    export = folder / f"export-step-{step:06d}"
    if export.is_dir():
        return export
    steps = JsonLines(folder / "metrics.jsonl").read()
    is_complete = read_json(folder / ACCOUNTING).get("state") == EndState.COMPLETED.value
    is_last = bool(steps) and int(steps[-1]["step"]) == step
    export = folder / "export"
    return export if is_complete and is_last and export.is_dir() else None


def _digest(path: Path) -> str:
    if not path.exists():
        return "no such file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_NUM_DIGITS]
