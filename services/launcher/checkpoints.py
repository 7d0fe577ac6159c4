"""`rollmesh checkpoints`: the complete checkpoints in a run folder. The run may still be in progress.

This module reads `checkpoints/*/manifest.json`, `evaluations.jsonl` and `mesh.yaml` alone, and does not need torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rollmesh.telemetry.evaluations import best_step, read_scores
from services.launcher.outcome import read_json
from services.launcher.run_folder import check_is_run, complete_checkpoints, read_settings

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """A complete checkpoint.

    Attributes:
        step: the last step that the checkpoint covers.
        version: the policy version that the step made, as "lineage.number".
        written_at: the time at which the checkpoint was complete, in UTC, ISO 8601.
        pass_at_1: the pass@1 of the evaluation at that step; None where the step had no evaluation.
        size_bytes: the size of all files of the checkpoint together.
        path: the checkpoint's folder, relative to the run folder.
        is_best: whether the checkpoint is the best of the listed ones, by learner.checkpoint.keep_best.
    """

    step: int
    version: str
    written_at: str
    pass_at_1: float | None
    size_bytes: int
    path: str
    is_best: bool


def show(folder: Path, *, is_json: bool) -> int:
    """Print the checkpoints of a run, the oldest first. Return the exit code.

    Raises:
        ConfigError: ``folder`` holds no run.
    """
    entries = list_checkpoints(folder)
    if is_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
    elif entries:
        print(_table(entries))
    else:
        print(f"{folder} holds no complete checkpoint", file=sys.stderr)
    return 0


def list_checkpoints(folder: Path) -> list[CheckpointEntry]:
    """Return the complete checkpoints of a run, sorted by step.

    The list leaves out a checkpoint whose manifest cannot be read, and a checkpoint that the learner removes meanwhile.

    Raises:
        ConfigError: ``folder`` holds no run.
    """
    check_is_run(folder)
    entries = list(_entries(folder, read_scores(folder, "pass_at_1")))
    best = _best(folder, [entry.step for entry in entries]) if entries else None
    return [dataclasses.replace(entry, is_best=entry.step == best) for entry in entries]


def _best(folder: Path, steps: Sequence[int]) -> int | None:
    """Return the best of the steps by the metric that the run keeps, by pass@1 where the run keeps none."""
    section = read_settings(folder).get("learner", {}).get("checkpoint", {})
    scores = read_scores(folder, section.get("keep_best") or "pass_at_1")
    candidates = {step: scores[step] for step in steps if step in scores}
    return best_step(candidates, is_highest_best=section.get("best_is") != "lowest")


def _entries(folder: Path, scores: Mapping[int, float]) -> Iterator[CheckpointEntry]:
    for step, checkpoint in complete_checkpoints(folder).items():
        path = checkpoint / "manifest.json"
        manifest = read_json(path)
        if "policy_version" not in manifest:
            continue
        try:
            written_at = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        except FileNotFoundError:  # the learner has just removed this old checkpoint
            continue
        version, place = str(manifest["policy_version"]), str(checkpoint.relative_to(folder))
        yield CheckpointEntry(step, version, written_at, scores.get(step), _size(checkpoint), place, is_best=False)


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder. A file that vanishes meanwhile counts as 0 bytes."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _table(entries: list[CheckpointEntry]) -> str:
    rows = [("step", "version", "written (UTC)", "pass@1", "best", "size", "folder")]
    for entry in entries:
        written = entry.written_at.removesuffix("+00:00").replace("T", " ")
        score = "-" if entry.pass_at_1 is None else f"{entry.pass_at_1:.3f}"
        best, size = "*" if entry.is_best else "", format_bytes(entry.size_bytes)
        rows.append((f"{entry.step:,}", entry.version, written, score, best, size, entry.path))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def format_bytes(size: int) -> str:
    """Return a size as text for people: 1,532,000,000 bytes are "1.5 GB"."""
    value, unit = float(size), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{size} B"
