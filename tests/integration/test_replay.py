"""The learner's side of a run is repeated to the bit from its recorded batches, and a changed batch is found."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rollmesh.errors import ReplayError
from rollmesh.replay.recording import load_recorded, record_batch
from services.launcher.replay import replay_run, show
from tests.integration.learner_process import GROUPS_PER_BATCH, learner_process

pytestmark = pytest.mark.engine

NUM_STEPS = 5
LEARNER: dict[str, Any] = {
    "checkpoint": {"every_steps": 2, "max_kept": 5},
    "should_record_batches": True,
    "tokens_per_micro_batch": 200,
}
PPO: dict[str, Any] = {"type": "ppo", "reward": {"normalize": True}}


def _train(folder: Path, **sections: dict[str, Any]) -> Path:
    """Train a run, and return its folder as `rollmesh up` leaves it."""

    async def scenario() -> Path:
        async with learner_process(folder, NUM_STEPS * GROUPS_PER_BATCH, **sections) as learner:
            code, stderr = await learner.ended()
            assert code == 0, stderr
            return learner.config.run.folder

    run = asyncio.run(scenario())
    shutil.copy(folder / "mesh.yaml", run / "mesh.yaml")
    (run / "accounting.json").write_text(json.dumps({"state": "completed"}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train PPO with a critic, running moments and an average, with two optimiser steps on a batch."""
    section = {**LEARNER, "ema_beta": 0.9, "steps_per_batch": 2}
    training = {"steps": NUM_STEPS}
    return _train(tmp_path_factory.mktemp("ppo"), learner=section, algorithm=PPO, training=training)


def test_a_whole_run_is_repeated_to_the_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run, (None, None), None, None, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "from the initial model" in lines[0]
    assert [line.split()[-1] for line in lines[1:-1]] == ["same"] * NUM_STEPS
    assert f"({NUM_STEPS} compared), and so are the weights" in lines[-1]


def test_a_replay_starts_from_a_checkpoint_and_names_every_group_once(run: Path, tmp_path: Path) -> None:
    result = replay_run(run, tmp_path / "out", steps=(3, 5))
    assert result.difference is None
    assert result.steps == range(3, 6)
    assert result.has_compared_weights
    groups = sorted(itertools.chain(*result.group_ids.values()))
    assert len(groups) == len(set(groups)) == 3 * GROUPS_PER_BATCH


def test_a_batch_that_lacks_a_group_gives_other_losses_and_weights(run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(run, tmp_path / run.name)
    path = changed / "batches" / "step-000004.msgpack"
    facts, groups = load_recorded(path)
    record_batch(path.parent, facts, groups[1:])
    result = replay_run(changed, tmp_path / "out", steps=(3, 4))
    assert result.difference is not None
    assert result.difference.step == 4


def test_a_damaged_batch_is_named(run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(run, tmp_path / run.name)
    path = changed / "batches" / "step-000003.msgpack"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReplayError, match=r"step-000003\.msgpack is damaged"):
        replay_run(changed, tmp_path / "out", steps=(3, 3))


def test_two_ranks_with_zero_2_are_repeated_to_the_bit(tmp_path: Path) -> None:
    section = {**LEARNER, "num_ranks": 2, "zero_stage": 2}
    run = _train(tmp_path / "grpo", learner=section, training={"steps": NUM_STEPS})
    result = replay_run(run, tmp_path / "out")
    assert result.difference is None
    assert result.num_compared == NUM_STEPS
    assert result.has_compared_weights
