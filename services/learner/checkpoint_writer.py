"""The writing of one checkpoint from main memory to disk, on the background thread of each rank.

::

    every rank:  its files written and synced ─► rng/rank-00001.json, which says so
    rank 0:      ... ─► waits for that file of all ranks ─► manifest.json ─► step-000060.partial becomes step-000060

The threads of the ranks speak through these files alone. A rank that cannot write leaves `rng/rank-00001.failed` with
the reason, and rank 0 ends the run with that reason.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from rollmesh.errors import ConfigError, DeadlineError
from rollmesh.telemetry.crash import full_disk
from rollmesh.telemetry.whole_file import write_synced, write_whole
from services.learner.host_copy import PendingFile
from services.learner.manifest import Manifest
from services.learner.replacement import publish_folder, sync

POLL_S = 0.2
"""Time between two looks at the files of the other ranks."""


@dataclass(frozen=True, slots=True)
class CheckpointCopy:
    """One rank's part of a checkpoint, in main memory.

    Attributes:
        partial: the folder to write to. It exists on the disk of every rank.
        final: the name of the folder once the checkpoint is complete.
        files: this rank's files.
        random_state: the states of this rank's random generators.
        manifest: the record of the checkpoint.
    """

    partial: Path
    final: Path
    files: Sequence[PendingFile]
    random_state: str
    manifest: Manifest


class CheckpointWriter:
    """The writer of one rank.

    Args:
        rank: this process's rank. Rank 0 completes the checkpoint.
        num_ranks: the number of ranks.
        patience_s: seconds that rank 0 waits for the other ranks while no file in the folder grows.
    """

    def __init__(self, rank: int, num_ranks: int, patience_s: float) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._patience_s = patience_s

    def write(self, copy: CheckpointCopy) -> None:
        """Write this rank's files, and on rank 0 complete the checkpoint. On return the files are on disk.

        Raises:
            ConfigError: a file cannot be written. On another rank than 0 that is raised only where the rank cannot even
                leave the reason for rank 0.
            DeadlineError: other ranks did not write their files (rank 0).
        """
        if self._rank == 0:
            with explained(copy.final):
                self._write_files(copy)
                self._await_others(copy)
                write_synced(copy.partial / "manifest.json", copy.manifest.model_dump_json(indent=2) + "\n")
                publish_folder(copy.partial, copy.final)
            return
        try:
            with explained(copy.final):
                self._write_files(copy)
        except ConfigError as error:
            with explained(copy.final):
                write_whole(self._failed_file(copy.partial, self._rank), error.problem)

    def _write_files(self, copy: CheckpointCopy) -> None:
        for file in copy.files:
            file.write(file.path)
            sync(file.path)
        for folder in {file.path.parent for file in copy.files}:
            sync(folder)
        write_whole(random_file(copy.partial, self._rank), copy.random_state)

    def _await_others(self, copy: CheckpointCopy) -> None:
        """Wait until all ranks have their files on disk."""
        sizes: dict[str, int] = {}
        deadline = time.monotonic() + self._patience_s
        for rank in range(1, self._num_ranks):
            while not random_file(copy.partial, rank).exists():
                failed = self._failed_file(copy.partial, rank)
                if failed.exists():
                    problem = f"rank {rank}: {failed.read_text(encoding='utf-8')}"
                    raise ConfigError("run.directory", problem, _FIX)
                if not copy.partial.is_dir():
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(copy.partial))
                found = _sizes(copy.partial)
                if found != sizes:
                    sizes, deadline = found, time.monotonic() + self._patience_s
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"rank {rank} has not written its part of {copy.final}, and no file in {copy.partial} grew for "
                        f"learner.silent_work_timeout_s = {self._patience_s:g} s"
                    )
                time.sleep(POLL_S)

    @staticmethod
    def _failed_file(folder: Path, rank: int) -> Path:
        return random_file(folder, rank).with_suffix(".failed")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file in a folder in bytes. A file that vanishes meanwhile may be missing."""
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes[str(path)] = path.stat().st_size
    return sizes


def random_file(folder: Path, rank: int) -> Path:
    """Return the file with the random generators of a rank, the last file that the rank writes to a checkpoint."""
    return folder / "rng" / f"rank-{rank:05d}.json"


_FIX = "make room or make the folder writable, then go on with `rollmesh resume`"


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into the sentence that ends the run: it names the folder and the reason.

    Raises:
        ConfigError: names ``folder``.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        full = full_disk(folder.parent)
        problem = f"{folder} cannot be written ({reason}{full}); the checkpoints before it are complete"
        raise ConfigError("run.directory", problem, _FIX) from error
