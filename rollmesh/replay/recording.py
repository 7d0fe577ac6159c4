"""Recorded batches, with which the learner's side of a run can be repeated: one file for each step.

``batches/step-000007.msgpack`` is a sequence of msgpack objects::

    header: a map with the fields of `RecordedStep`, "schema" and "group_ids"
    one group after the other, in the order of the batch, encoded as in the queue
    SHA-256 of all bytes before

The header alone says how the step was made, so that a plan of many steps reads few bytes. A file takes the bytes of its
groups (`encode_group` has the formula) and some 6 kB for the settings: a batch of 64 groups of 8 samples, with 100
prompt tokens and 500 generated tokens each and without references, takes 2.3 MB.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack

from rollmesh.errors import ConfigError, InvalidArgumentError, ReplayError
from rollmesh.replay.codec import decode_group, encode_group
from rollmesh.telemetry.whole_file import write_whole
from rollmesh.types import Group, PolicyVersion

SCHEMA = 1
_DIGEST_BYTES = 34
"""Length of the last object: two bytes of msgpack, then 32 bytes."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """Everything beside the groups on which the result of a step depends.

    Attributes:
        step: the number of the step, from 1.
        version: the policy version that the step started from, as "lineage.number".
        num_ranks: the number of ranks among which the groups were divided.
        num_batches: the number of batches of the whole run, on which the learning rate depends.
        settings: the learner's configuration as YAML.
    """

    step: int
    version: str
    num_ranks: int
    num_batches: int
    settings: str

    @property
    def policy_version(self) -> PolicyVersion:
        return PolicyVersion.parse(self.version)


def recorded_paths(folder: Path) -> dict[int, Path]:
    """Return the files of recorded batches in a folder by step, in the order of the steps."""
    matches = [(re.fullmatch(r"step-(\d+)\.msgpack", path.name), path) for path in folder.glob("step-*.msgpack")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def record_batch(folder: Path, facts: RecordedStep, groups: Sequence[Group]) -> Path:
    """Write the batch of a step. An earlier recording of the step is replaced as a whole. Return the path.

    On return the file is on disk: a checkpoint that is written later covers recorded steps only.

    Raises:
        OSError: the file cannot be written.
    """
    header = {"schema": SCHEMA, **asdict(facts), "group_ids": [group.group_id for group in groups]}
    content = b"".join(map(msgpack.packb, (header, *map(encode_group, groups))))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{facts.step:06d}.msgpack"
    write_whole(path, content + msgpack.packb(hashlib.sha256(content).digest()))
    return path


def read_facts(path: Path) -> tuple[RecordedStep, list[str]]:
    """Return the facts of a recorded step, and the ids of its groups, without reading the groups.

    Raises:
        ConfigError: the file is no recorded batch, or an older version of RollMesh recorded the batch.
        ReplayError: the header is damaged.
    """
    try:
        with path.open("rb") as file:
            header = msgpack.Unpacker(file, read_size=65_536).unpack()
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise _no_recording(path, str(error)) from error
    return _facts_of(path, header)


def load_recorded(path: Path) -> tuple[RecordedStep, list[Group]]:
    """Return the facts and the groups that `record_batch` wrote.

    Raises:
        ConfigError: the file is no recorded batch, or an older version of RollMesh recorded the batch.
        ReplayError: the file is damaged: its bytes differ from the bytes that were written.
    """
    facts, group_ids = read_facts(path)
    content = path.read_bytes()
    if content[-_DIGEST_BYTES:] != msgpack.packb(hashlib.sha256(content[:-_DIGEST_BYTES]).digest()):
        raise ReplayError(f"{path} is damaged: its SHA-256 is not the one that was recorded with the batch")
    try:
        unpacker = msgpack.Unpacker(max_buffer_size=len(content))
        unpacker.feed(content)
        groups = [decode_group(payload) for payload in list(unpacker)[1:-1]]
    except (ValueError, msgpack.UnpackException, InvalidArgumentError) as error:
        raise ReplayError(f"{path} holds no groups that this version can read: {error}") from error
    if [group.group_id for group in groups] != group_ids:
        raise ReplayError(f"{path} holds other groups than its header names")
    return facts, groups


def _facts_of(path: Path, header: Any) -> tuple[RecordedStep, list[str]]:
    if isinstance(header, list):
        problem = "was recorded by an older version of RollMesh, without the version and the settings of its step"
        raise ConfigError(str(path), problem, "record the run again to repeat it")
    if not isinstance(header, Mapping) or "schema" not in header:
        raise _no_recording(path, "it begins with no header")
    if header["schema"] != SCHEMA:
        problem = f"has schema {header['schema']}, this version reads {SCHEMA}"
        raise ConfigError(str(path), problem, "use the version that wrote it")
    try:
        facts = RecordedStep(**{name: header[name] for name in RecordedStep.__dataclass_fields__})
        PolicyVersion.parse(facts.version)
        group_ids = [str(group_id) for group_id in header["group_ids"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(f"{path} is damaged: its header cannot be read ({error!r})") from error
    if path.stem != f"step-{facts.step:06d}":
        raise ReplayError(f"{path} holds the batch of step {facts.step}")
    return facts, group_ids


def _no_recording(path: Path, problem: str) -> ConfigError:
    return ConfigError(str(path), f"is no recorded batch ({problem})", "name a file of a run's batches/")
