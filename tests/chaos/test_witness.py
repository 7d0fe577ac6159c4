"""The witness sees a batch that was lost, and a batch that was trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollmesh.replay.recording import RecordedStep, record_batch
from services.config import MeshConfig
from services.learner.ranks import Ranks
from tests.chaos.witness import TOLERANCE, repeat, weights
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

NUM_STEPS = 4


@pytest.fixture
def config(tmp_path: Path) -> MeshConfig:
    return mesh_config(write_tiny_model(tmp_path / "model"), tmp_path, training={"steps": NUM_STEPS})


@pytest.fixture
def batches(tmp_path: Path) -> list[Path]:
    steps = range(1, NUM_STEPS + 1)
    return [
        record_batch(
            tmp_path / "batches",
            RecordedStep(step, f"0.{step - 1}", 1, 4, ""),
            random_groups(4, 4, seed=step, version=step - 1),
        )
        for step in steps
    ]


def apart(config: MeshConfig, ranks: Ranks, folder: Path, one: list[Path], other: list[Path]) -> float:
    """Return the largest difference of a weight after training on two lists of batches."""
    for name, batches in (("one", one), ("other", other)):
        repeat(config, ranks, batches, list(range(len(batches))), folder / name)
    first, second = weights(folder / "one"), weights(folder / "other")
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_the_same_batches_give_the_same_weights(
    config: MeshConfig, ranks: Ranks, batches: list[Path], tmp_path: Path
) -> None:
    assert apart(config, ranks, tmp_path, batches, batches) <= TOLERANCE


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
@pytest.mark.parametrize("fault", ["lost", "trained twice"])
def test_a_batch_that_was_lost_or_trained_twice_is_seen_in_the_weights(
    config: MeshConfig, ranks: Ranks, batches: list[Path], tmp_path: Path, step: int, fault: str
) -> None:
    place = step - 1
    wrong = batches[:place] + batches[step:] if fault == "lost" else batches[:step] + batches[place:]
    assert apart(config, ranks, tmp_path, batches, wrong) > 100 * TOLERANCE


def test_a_batch_in_which_one_group_was_exchanged_is_seen_in_the_weights(
    config: MeshConfig, ranks: Ranks, batches: list[Path], tmp_path: Path
) -> None:
    groups = random_groups(4, 4, seed=2, version=1)
    exchanged = record_batch(tmp_path / "exchanged", RecordedStep(2, "0.1", 1, 4, ""), [*groups[:3], groups[0]])
    assert apart(config, ranks, tmp_path, batches, [batches[0], exchanged, *batches[2:]]) > 100 * TOLERANCE
