"""Recorded batches, with which a step can be repeated and studied: one msgpack file a step, encoded as in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgpack

from rollmesh.errors import ConfigError
from rollmesh.replay.codec import decode_group, encode_group
from rollmesh.types import Group


def record_batch(folder: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write the groups of a step, in the order of the batch, to ``folder/step-000001.msgpack``. Return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.msgpack"
    path.write_bytes(msgpack.packb([encode_group(group) for group in groups]))
    return path


def load_recorded(path: Path) -> list[Group]:
    """Return the groups that `record_batch` wrote.

    Raises:
        ConfigError: the file is missing or is not a recorded batch.
    """
    try:
        encoded = msgpack.unpackb(path.read_bytes())
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise ConfigError(str(path), f"is not a recorded batch ({error})", "name a file of a run's batches/") from error
    if not isinstance(encoded, list):
        raise ConfigError(str(path), "is not a recorded batch", "name a file of a run's batches/")
    return [decode_group(group) for group in encoded]
