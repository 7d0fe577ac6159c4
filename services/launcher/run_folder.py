"""The three files of a run folder that describe the starts of the run, so that the run can be resumed.

::

    requested.yaml   the configuration that the user asked for, before ports are chosen and a Redis is started
    mesh.yaml        the resolved configuration, which the processes of the run read; written anew at each start
    starts.jsonl     one line for each start: its time, its working directory, the step before it, the changed settings

Paths in `requested.yaml` are absolute, so that a run can be resumed from any working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rollmesh.config import load_yaml, with_absolute_paths
from rollmesh.errors import ConfigError
from rollmesh.telemetry.json_lines import JsonLines
from rollmesh.telemetry.whole_file import write_synced, write_whole
from services.config import MeshConfig, dump_mesh, load_mesh

REQUESTED = "requested.yaml"
RESOLVED = "mesh.yaml"
STARTS = "starts.jsonl"


def write_requested(folder: Path, config: MeshConfig) -> None:
    """Write `requested.yaml`. After a power cut the file has either its whole old or its whole new content.

    Args:
        folder: the run folder.
        config: the configuration that the user asked for, with the run's id.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / REQUESTED, dump_mesh(with_absolute_paths(config)))


def write_resolved(folder: Path, config: MeshConfig) -> None:
    """Write `mesh.yaml` in place: a new file would lose the claim to the run folder, which is a lock on the old file.

    Raises:
        OSError: the folder cannot be written.
    """
    write_synced(folder / RESOLVED, dump_mesh(config))


def read_requested(folder: Path, overrides: Sequence[str] = ()) -> MeshConfig:
    """Return the configuration that the user asked for at the run's last start.

    Args:
        folder: the run folder. The folder may have been moved: `run.directory` becomes its present parent.
        overrides: settings of the form KEY=VALUE, as after ``--set``.

    Raises:
        ConfigError: ``folder`` holds no run, or the run cannot be resumed; the message says why.
    """
    folder = folder.resolve()
    check_is_run(folder)
    if not (folder / REQUESTED).exists():
        problem = f"has no {REQUESTED}: an older version of RollMesh wrote the run, which cannot be resumed"
        raise ConfigError(str(folder), problem, "start a new run")
    config = load_mesh(folder / REQUESTED, overrides)
    if config.run.name != folder.name:
        problem = f"{config.run.name!r} is not the name of the folder {folder}; a run keeps its name"
        raise ConfigError("run.name", problem, "name the folder as the run, and do not set run.name")
    return with_run(config, directory=folder.parent)


def with_run(config: MeshConfig, **changes: Any) -> MeshConfig:
    """Return a copy with changed settings of the `run` section."""
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


def unusable_folder(error: OSError, fix: str = "name a folder that can be written") -> ConfigError:
    """Return an error of the file system under the run folder in the words of a fault of the user's."""
    problem = f"{error.filename} cannot be used for the run folder ({error.strerror})"
    return ConfigError("run.directory", problem, fix)


def check_is_run(folder: Path) -> None:
    """Refuse a folder that holds no run.

    Raises:
        ConfigError: names the folder.
    """
    if not (folder / RESOLVED).exists():
        raise ConfigError(str(folder), "holds no run", "name a run folder, such as runs/NAME")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run as plain values.

    `mesh.yaml` gives the configuration. After a power cut `mesh.yaml` may be empty: then `requested.yaml` gives it.

    Raises:
        ConfigError: neither file can be read.
    """
    try:
        return load_yaml(folder / RESOLVED)
    except ConfigError:
        if not (folder / REQUESTED).exists():
            raise
        return load_yaml(folder / REQUESTED)


def note_start(folder: Path, *, after_step: int | None, changes: Sequence[str] = (), earlier_end: str = "") -> None:
    """Add a line to `starts.jsonl`.

    Args:
        folder: the run folder.
        after_step: the step of the checkpoint from which a resumed run goes on, 0 for none; None for the first start.
        changes: the settings that changed, one sentence each.
        earlier_end: how the run had ended before, e.g. "interrupted"; empty where the end was not recorded.
    """
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "working_directory": os.getcwd(),
        "after_step": after_step,
        "changes": list(changes),
        "earlier_end": earlier_end,
    }
    JsonLines(folder / STARTS).append(entry)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `starts.jsonl`, the first start first."""
    return JsonLines(folder / STARTS).read()


def read_resumes(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `starts.jsonl` that are resumes."""
    return [start for start in read_starts(folder) if start["after_step"] is not None]


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the folders of a run's complete checkpoints by step, in the order of the steps.

    A checkpoint is complete with its manifest, and the step stands in its name: 40 for ``checkpoints/step-000040``.
    """
    folders = [manifest.parent for manifest in folder.glob("checkpoints/step-*/manifest.json")]
    matches = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folders]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
