"""Several ranks under torch's launcher: the same recorded batches give the same losses, whatever the ZeRO stage."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rollmesh.errors import DeadlineError
from rollmesh.replay.recording import RecordedStep, record_batch
from rollmesh.telemetry.json_lines import JsonLines
from services.config import dump_mesh
from services.launcher.replay import replay_run
from services.learner.ranks import meeting_store
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

pytestmark = pytest.mark.engine

NUM_STEPS = 20
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a mesh file and 20 recorded batches of unequal groups.

    The last two batches have one group each, which is fewer than there are ranks.
    """
    folder = tmp_path_factory.mktemp("run")
    config = mesh_config(
        write_tiny_model(folder / "model"),
        folder,
        learner={"tokens_per_micro_batch": 160, "optimizer": {"lr": 1e-3, "warmup_steps": 2, "schedule": "linear"}},
        algorithm={"kl": {"coef": 0.05}},
        reference={},
    )
    (folder / "mesh.yaml").write_text(dump_mesh(config), encoding="utf-8")
    for step in range(1, NUM_STEPS + 1):
        num_groups = 1 if step > NUM_STEPS - 2 else 4
        groups = random_groups(num_groups, 4, seed=step, first_prompt=4 * step, has_reference=True)
        facts = RecordedStep(step, f"0.{step - 1}", 1, NUM_STEPS, dump_mesh(config))
        record_batch(folder / "batches", facts, groups)
    return folder


def _losses(run_folder: Path, num_ranks: int, zero_stage: int) -> list[float]:
    out = run_folder / f"replay-{num_ranks}-{zero_stage}"
    replay_run(run_folder, out, num_ranks=num_ranks, overrides=[f"learner.zero_stage={zero_stage}"])
    return [line["policy/loss"] for line in JsonLines(out / "metrics.jsonl").read()]


@pytest.fixture(scope="module")
def expected(run_folder: Path) -> list[float]:
    return _losses(run_folder, num_ranks=1, zero_stage=0)


def test_training_on_recorded_batches_moves_the_loss(expected: list[float]) -> None:
    assert len(expected) == NUM_STEPS
    assert len(set(expected)) == NUM_STEPS


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_give_the_losses_of_one(run_folder: Path, expected: list[float], zero_stage: int) -> None:
    assert _losses(run_folder, num_ranks=2, zero_stage=zero_stage) == pytest.approx(expected, abs=1e-4)


def test_a_rank_whose_companions_never_come_says_so_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(
        DeadlineError, match=r"rank 0 of the learner's 3 waited 0\.5 s at 127\.0\.0\.1:\d+ for rank 1, 2;"
    ):
        meeting_store(0, 3, timeout_s=0.5)
    with pytest.raises(DeadlineError, match=r"rank 1 of the learner's 3 waited 0\.5 s .* for rank 0;"):
        meeting_store(1, 3, timeout_s=0.5)
