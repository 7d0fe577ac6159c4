"""Recorded batches: they are read back as they were, and damage and old files are found."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest

from rollmesh.errors import ConfigError, ReplayError
from rollmesh.replay.codec import encode_group
from rollmesh.replay.recording import RecordedStep, load_recorded, read_facts, record_batch, recorded_paths
from tests.unit.learner.samples import random_groups

FACTS = RecordedStep(7, "1.9", 2, 20, "run: {name: x}\n")


def test_a_recorded_batch_is_read_back_as_it_was(tmp_path: Path) -> None:
    groups = random_groups(3, 2, has_reference=True)
    path = record_batch(tmp_path / "batches", FACTS, groups)
    assert recorded_paths(tmp_path / "batches") == {7: path}
    facts, read = load_recorded(path)
    assert facts == FACTS
    assert list(map(encode_group, read)) == list(map(encode_group, groups))


def test_the_facts_are_read_without_the_groups(tmp_path: Path) -> None:
    groups = random_groups(3, 2)
    path = record_batch(tmp_path, FACTS, groups)
    path.write_bytes(path.read_bytes()[:-200])
    assert read_facts(path) == (FACTS, [group.group_id for group in groups])


def test_a_step_that_is_trained_again_replaces_its_batch(tmp_path: Path) -> None:
    record_batch(tmp_path, FACTS, random_groups(3, 2))
    (again,) = random_groups(1, 2, seed=9)
    path = record_batch(tmp_path, FACTS, [again])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007.msgpack"]
    assert encode_group(load_recorded(path)[1][0]) == encode_group(again)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = record_batch(tmp_path, FACTS, random_groups(1, 1))
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises((ReplayError, ConfigError), match=r"step-000007\.msgpack"):
            load_recorded(path)


def test_a_batch_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    path = record_batch(tmp_path, FACTS, random_groups(1, 1))
    with pytest.raises(ReplayError, match="holds the batch of step 7"):
        load_recorded(path.rename(tmp_path / "step-000008.msgpack"))


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x01"])
def test_a_file_that_is_no_recorded_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step-000001.msgpack"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no recorded batch"):
        load_recorded(path)


def test_a_batch_of_an_older_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.msgpack"
    path.write_bytes(msgpack.packb([encode_group(group) for group in random_groups(1, 1)]))
    with pytest.raises(ConfigError, match="older version of RollMesh"):
        read_facts(path)
