"""Checkpoints are written beside training, and a fault of the disk ends the run with the checkpoint before intact."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from rollmesh.config.shared import RunSection
from rollmesh.errors import ConfigError, DeadlineError, RunEndedError
from rollmesh.types import PolicyVersion
from services.learner.checkpoint import CheckpointStore
from services.learner.checkpoint_writer import CheckpointCopy, CheckpointWriter, random_file
from services.learner.config import CheckpointSection, LearnerSection
from services.learner.host_copy import PendingFile, copy_to_host
from services.learner.manifest import Manifest
from services.learner.ranks import Ranks
from tests.fakes.learnables import FakePolicy

RANKS = Ranks(0, 1, torch.device("cpu"))


def store_in(folder: Path, **checkpoint: object) -> CheckpointStore:
    section = LearnerSection(checkpoint=CheckpointSection(**checkpoint))  # type: ignore[arg-type]
    return CheckpointStore(RunSection(name="run", directory=folder), section, "0" * 64, RANKS)


def save(store: CheckpointStore, policy: FakePolicy, step: int, *, is_last: bool = False) -> None:
    store.save(policy.learnables, {"kl_coef": 0.5}, step, PolicyVersion(0, step), is_last=is_last)


def loaded(store: CheckpointStore, step: int) -> list[float]:
    policy = FakePolicy()
    assert store.load(policy.learnables, step).step == step
    return policy.weights.tolist()


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path) -> None:
    policy, store = FakePolicy(), store_in(tmp_path)
    policy.may_write.clear()
    save(store, policy, 1)
    policy.weights.fill_(7)
    expected = torch.rand(1)  # the generators move on as well
    assert store.take_saved() is None
    assert store.steps() == []
    policy.may_write.set()
    store.wait()
    saved = store.take_saved()
    assert saved is not None
    assert saved.step == 1
    assert store.take_saved() is None
    assert loaded(store, 1) == [0, 0, 0, 0]
    assert torch.equal(torch.rand(1), expected)
    assert torch.load(tmp_path / "run" / "export-step-000001" / "model.pt")["weights"].tolist() == [0, 0, 0, 0]


def test_the_copy_leaves_main_memory_with_the_end_of_the_writing(tmp_path: Path) -> None:
    policy, store = FakePolicy(), store_in(tmp_path)
    copies = [copy_to_host({"weights": policy.weights})]
    gone = weakref.ref(copies[0]["weights"])
    policy.copy_weights = copies.pop  # type: ignore[method-assign]
    save(store, policy, 1)
    store.wait()
    threads = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    for thread in threads:
        thread.join(60)
    assert gone() is None


def test_the_wait_for_the_disk_ends_with_the_run(tmp_path: Path) -> None:
    policy, store = FakePolicy(), store_in(tmp_path)
    policy.may_write.clear()
    save(store, policy, 1)

    def check() -> None:
        raise RunEndedError("the run is over")

    with pytest.raises(RunEndedError):
        store.wait(check)
    policy.may_write.set()
    store.wait()


def _full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", [1, 2, 3], ids=["the first file", "the second file", "the export"])
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(tmp_path: Path, part: int) -> None:
    policy, store = FakePolicy(), store_in(tmp_path)
    save(store, policy, 1)
    store.wait()
    policy.weights.fill_(7)
    left = iter([lambda: None] * (part - 1) + [_full_disk])
    policy.before_write = lambda: next(left)()
    save(store, policy, 2)
    place = "export-step-000002" if part == 3 else "checkpoints/step-000002"
    for ask in (store.wait, store.wait, store.take_saved):
        with pytest.raises(ConfigError, match=rf"run\.directory: .*run/{place} cannot be written \(No space left"):
            ask()
    again = store_in(tmp_path)
    assert loaded(again, 1) == [0, 0, 0, 0]
    assert again.steps() == ([1, 2] if part == 3 else [1])
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_folder_that_is_removed_meanwhile_ends_the_run(tmp_path: Path) -> None:
    policy, store = FakePolicy(), store_in(tmp_path)
    policy.before_write = lambda: shutil.rmtree(tmp_path / "run", ignore_errors=True)
    save(store, policy, 1)
    with pytest.raises(ConfigError, match=r"checkpoints/step-000001 cannot be written \(No such file or directory\)"):
        store.wait()


def _part_of(folder: Path, rank: int, write: Callable[[Path], None]) -> CheckpointCopy:
    manifest = Manifest(
        schema_version=2,
        run="run",
        lineage=0,
        step=1,
        policy_version="0.1",
        deepspeed_tag="step-000001",
        num_ranks=2,
        zero_stage=2,
        has_critic=False,
        has_average=False,
        state={},
        config_hash="",
    )
    partial = folder / "step-000001.partial"
    (partial / "rng").mkdir(parents=True, exist_ok=True)
    file = PendingFile(partial / f"state-{rank}", write)
    return CheckpointCopy(partial, folder / "step-000001", [file], "{}", manifest)


def test_a_checkpoint_is_complete_once_every_rank_has_written_its_part(tmp_path: Path) -> None:
    write = CheckpointWriter(0, 2, patience_s=60).write
    first = threading.Thread(target=write, args=(_part_of(tmp_path, 0, lambda path: path.write_text("0") and None),))
    first.start()
    own = random_file(tmp_path / "step-000001.partial", 0)
    while not own.exists():
        first.join(0.01)
    assert not (tmp_path / "step-000001").exists()
    CheckpointWriter(1, 2, 60).write(_part_of(tmp_path, 1, lambda path: path.write_text("1") and None))
    first.join(60)
    names = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert names == ["manifest.json", "rng", "state-0", "state-1"]


def test_a_rank_that_cannot_write_is_named_by_rank_0(tmp_path: Path) -> None:
    CheckpointWriter(1, 2, 60).write(_part_of(tmp_path, 1, lambda path: _full_disk()))
    with pytest.raises(ConfigError, match=r"run\.directory: rank 1: .*step-000001 cannot be written \(No space left"):
        CheckpointWriter(0, 2, 60).write(_part_of(tmp_path, 0, Path.touch))
    assert not (tmp_path / "step-000001").exists()


def test_a_rank_that_never_writes_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match=r"rank 1 has not written .* learner\.silent_work_timeout_s = 0\.01 s"):
        CheckpointWriter(0, 2, patience_s=0.01).write(_part_of(tmp_path, 0, Path.touch))


def test_the_start_removes_what_was_being_written(tmp_path: Path) -> None:
    for name in ("checkpoints/step-000003.partial", "export.partial", "checkpoints/step-000002"):
        (tmp_path / "run" / name / "rng").mkdir(parents=True)
    assert store_in(tmp_path).steps() == [2]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]


def _save_all(store: CheckpointStore, steps: Sequence[int]) -> None:
    for step in steps:
        save(store, FakePolicy(), step)
        store.wait()


def _evaluated(folder: Path, scores: Mapping[int, float]) -> None:
    lines = [json.dumps({"step": step, "pass_at_1": score}) for step, score in scores.items()]
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "evaluations.jsonl").write_text("\n".join(lines))


def test_the_best_checkpoint_stays_with_its_export_until_a_better_one_comes(tmp_path: Path) -> None:
    store = store_in(tmp_path, max_kept=1, keep_best="pass_at_1")
    _save_all(store, [1, 2])
    assert store.steps() == [2], "without evaluations the newest stay"
    _evaluated(tmp_path, {1: 0.9, 2: 0.5, 3: 0.4})
    _save_all(store, [3, 4])
    assert store.steps() == [2, 4]
    assert (tmp_path / "run" / "export-step-000002").is_dir()
    _evaluated(tmp_path, {2: 0.5, 4: 0.5})
    _save_all(store, [5])
    assert store.steps() == [4, 5]
    assert sorted(path.name for path in (tmp_path / "run").glob("export*")) == [
        "export-step-000004",
        "export-step-000005",
    ]


def test_an_evaluation_file_that_cannot_be_read_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_in(tmp_path, max_kept=1, keep_best="pass_at_1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluations.jsonl").write_text("no JSON\n{}\n")
    _save_all(store, [1, 2])
    assert store.steps() == [2]
    assert "no checkpoint is kept as the best" in caplog.text


def test_all_that_is_kept_stays_within_its_bytes(tmp_path: Path) -> None:
    _save_all(store_in(tmp_path), [1])
    each = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    store = store_in(tmp_path, max_kept=9, max_bytes=3 * each + each // 2)
    _save_all(store, [2, 3, 4, 5])
    assert store.steps() == [3, 4, 5]
    _save_all(store_in(tmp_path, max_bytes=1), [6])
    assert store.steps() == [6]


def test_a_run_that_goes_on_from_an_older_step_deletes_the_later_ones(tmp_path: Path) -> None:
    store = store_in(tmp_path, max_kept=9)
    _save_all(store, [1, 2, 3])
    store.drop_later(1)
    assert store.steps() == [1]
    assert [path.name for path in (tmp_path / "run").glob("export*")] == ["export-step-000001"]
