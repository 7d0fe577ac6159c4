"""Whole meshes on the real engines: the promises that hold at the end of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rollmesh.data.order import PromptOrder
from rollmesh.replay.recording import load_recorded
from rollmesh.telemetry.json_lines import JsonLines
from rollmesh.types import Group
from services.launcher.replay import replay_run
from tests.integration.mesh_runs import (
    DEMO,
    REPOSITORY,
    MeshRun,
    finish_mesh,
    processes_of,
    run_mesh,
    service_logs,
    start_mesh,
)

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(600)]

SMALL = ["training.prompts_per_step=8", "training.samples_per_prompt=4", "evaluation.every_steps=4"]


@pytest.fixture(scope="module")
def asynchronous(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> MeshRun:
    """Run eight asynchronous steps with every service."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = [*SMALL, "training.steps=8", "training.max_staleness=2", "learner.should_record_batches=true"]
    return run_mesh(demo, runs, "asynchronous", overrides)


@pytest.fixture(scope="module", params=[2, 3], ids=["zero-2", "zero-3"])
def synchronous(demo: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> MeshRun:
    """Run twenty synchronous steps with two rollout workers and two ranks under ZeRO, without a reference."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = [
        *SMALL,
        "training.steps=20",
        "training.max_staleness=0",
        "rollout.num_workers=2",
        "learner.num_ranks=2",
        f"learner.zero_stage={request.param}",
        "learner.should_record_batches=true",
        "algorithm.kl.coef=0",
        "evaluation.every_steps=20",
    ]
    return run_mesh(demo, runs, "synchronous", overrides, timeout_s=500)


@pytest.mark.parametrize("preset", ["reinforce++", "ppo"])
def test_one_sample_for_each_prompt_trains_where_the_algorithm_compares_no_samples(
    demo: Path, tmp_path: Path, preset: str
) -> None:
    overrides = ["training.prompts_per_step=8", "training.samples_per_prompt=1", "training.steps=2", "evaluation=null"]
    run = run_mesh(demo, tmp_path, "single", [*overrides, f"algorithm.type={preset}"])
    assert run.accounting["num_trained"] == 2 * 8
    assert run.accounting["num_groups"]["failed"] == 0


def _batches(run: MeshRun) -> Iterator[list[Group]]:
    for path in sorted((run.folder / "batches").glob("step-*.msgpack")):
        yield load_recorded(path)[1]


def test_every_step_is_trained_and_every_group_accounted_for(asynchronous: MeshRun) -> None:
    assert [line["step"] for line in asynchronous.lines("metrics.jsonl")] == list(range(1, 9))
    counts = asynchronous.accounting["num_groups"]
    trained = counts["trained"] + counts["retired"]
    still_open = sum(counts[state] for state in ("pending", "leased", "ready", "batched"))
    assert trained == 8 * 8
    assert still_open == 0
    assert asynchronous.accounting["num_opened"] == trained + counts["filtered"] + counts["failed"]


def test_what_the_reward_logs_and_where_prompts_come_from_reaches_the_metrics(asynchronous: MeshRun) -> None:
    for line in asynchronous.lines("metrics.jsonl"):
        assert line["source/operators/count"] == line["extra/tries/count"] == 8 * 4
        assert line["source/operators/score"] == pytest.approx(line["score/mean"])
        assert 1 <= line["extra/tries"] <= 6
    for line in asynchronous.lines("evaluations.jsonl"):
        assert line["source/operators/score"] == pytest.approx(line["pass_at_1"])
        assert line["extra/tries/count"] == line["num_prompts"]


def test_each_prompt_is_trained_exactly_once(asynchronous: MeshRun) -> None:
    trained = [group.prompt_id for batch in _batches(asynchronous) for group in batch]
    assert len(trained) == 64
    assert len(set(trained)) == 64


def test_an_asynchronous_run_is_asynchronous_and_within_its_bound(asynchronous: MeshRun) -> None:
    stale = [
        step - 1 - sample.oldest_version.number
        for step, batch in enumerate(_batches(asynchronous), start=1)
        for group in batch
        for sample in group.samples
    ]
    # the staleness bound η + ⌈(W − 1) / B⌉, with η = 2 and W = B + 1
    assert max(stale) <= 2 + 1
    assert max(stale) >= 1
    histograms = [line["staleness_histogram"] for line in asynchronous.lines("metrics.jsonl")]
    recorded = {staleness: stale.count(staleness) for staleness in set(stale)}
    reported = {k: sum(h.get(str(k), 0) for h in histograms) for k in recorded}
    assert reported == recorded


def test_every_token_has_its_version_logprob_and_reference(asynchronous: MeshRun) -> None:
    for batch in _batches(asynchronous):
        for group in batch:
            for sample in group.samples:
                generated = sample.num_generated_tokens
                assert sum(span.length for span in sample.version_spans) == generated
                assert sample.behaviour_logprobs.shape == (generated,)
                assert np.all(sample.behaviour_logprobs <= 0)
                assert sample.reference_logprobs is not None
                assert sample.reference_logprobs.shape == sample.response_token_ids.shape
                assert sample.score is not None


def test_version_zero_is_the_reference_itself(asynchronous: MeshRun) -> None:
    """The reference and version 0 have the same weights, so reference and engine agree on every token."""
    compared = 0
    for batch in _batches(asynchronous):
        for sample in (s for group in batch for s in group.samples if s.newest_version.number == 0):
            assert sample.reference_logprobs is not None
            np.testing.assert_allclose(sample.behaviour_logprobs, sample.reference_logprobs, atol=1e-4)
            compared += 1
    assert compared >= 32


def test_evaluations_belong_to_one_version_each(asynchronous: MeshRun) -> None:
    evaluations = asynchronous.lines("evaluations.jsonl")
    assert [evaluation["version"] for evaluation in evaluations] == ["0.0", "0.4", "0.8"]
    assert all(evaluation["num_prompts"] == 64 and evaluation["num_failed"] == 0 for evaluation in evaluations)


def test_the_export_loads_with_transformers(asynchronous: MeshRun) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('<bos> 7 ? 7 ? 1 = 15 :', add_special_tokens=False, return_tensors='pt').input_ids\n"
        "print(model.generate(ids, max_new_tokens=4).shape[1])\n"
    )
    command = [sys.executable, "-c", code, str(asynchronous.folder / "export")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert 10 <= int(result.stdout.split()[-1]) <= 13


def test_the_run_folder_is_complete(asynchronous: MeshRun) -> None:
    present = {path.name for path in asynchronous.folder.iterdir()}
    assert {"mesh.yaml", "logs", "metrics.jsonl", "evaluations.jsonl", "report.md", "report.png", "export"} <= present
    logs = {path.name for path in (asynchronous.folder / "logs").iterdir()}
    assert logs == {f"{name}.log" for name in ("coordinator", "rollout-0", "reward", "reference", "learner")}


def test_nothing_is_left_running(asynchronous: MeshRun, synchronous: MeshRun) -> None:
    for run in (asynchronous, synchronous):
        assert processes_of(run.folder) == []


def test_nothing_listens_where_another_machine_could_connect(asynchronous: MeshRun, synchronous: MeshRun) -> None:
    """One mesh has every service. The other mesh has two learner ranks and two rollout workers."""
    for run in (asynchronous, synchronous):
        assert len(run.listeners) >= 5  # coordinator, reward, rollout, learner, and the rendezvous store
        assert [listener for listener in run.listeners if not listener.is_loopback] == []


def test_without_staleness_every_sample_is_on_policy(synchronous: MeshRun) -> None:
    for step, batch in enumerate(_batches(synchronous), start=1):
        versions = {span.version.number for group in batch for sample in group.samples for span in sample.version_spans}
        assert versions == {step - 1}


def test_without_staleness_the_batches_are_those_of_a_synchronous_loop(synchronous: MeshRun, demo: Path) -> None:
    num_rows = len((demo / "data" / "train.jsonl").read_text().splitlines())
    order = PromptOrder("train", num_rows, epochs=1, seed=1, should_shuffle=True)
    batches = [[group.prompt_id for group in batch] for batch in _batches(synchronous)]
    assert batches == [order.slice(8 * step, 8 * step + 8) for step in range(20)]


def test_both_rollout_workers_took_part(synchronous: MeshRun) -> None:
    committed = [(synchronous.folder / "logs" / f"rollout-{i}.log").read_text() for i in range(2)]
    assert all("error" not in log.lower().split('"level"') for log in committed)
    report = (synchronous.folder / "report.md").read_text()
    assert "160 groups opened = 160 trained" in report


def test_ranks_and_zero_stages_do_not_change_the_losses(synchronous: MeshRun, tmp_path: Path) -> None:
    """One rank without ZeRO trains on the batches that the two ranks of the mesh recorded."""
    settings = ["learner.zero_stage=0"]
    result = replay_run(synchronous.folder, tmp_path / "replay", num_ranks=1, overrides=settings)
    assert result.num_compared == 20
    repeated = JsonLines(result.out / "metrics.jsonl").read()
    losses = [[line["policy/loss"] for line in lines] for lines in (synchronous.lines("metrics.jsonl"), repeated)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)


def test_the_learners_side_of_an_asynchronous_run_is_repeated_to_the_bit(asynchronous: MeshRun, tmp_path: Path) -> None:
    result = replay_run(asynchronous.folder, tmp_path / "replay")
    assert result.difference is None
    assert result.num_compared == 8
    assert result.has_compared_weights


HOSTILE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "grpc_proxy": "http://127.0.0.1:9",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONOPTIMIZE": "1",
}
"""Variables that a job scheduler, a company's network and an old system may set around a run."""


def test_a_run_bears_its_surroundings_and_the_loss_of_its_reader_and_ends_in_order(demo: Path, tmp_path: Path) -> None:
    users = tmp_path / "users"
    (users / "services").mkdir(parents=True)
    for name in ("services/__init__.py", "redis.py", "yaml.py"):
        (users / name).write_text("raise SystemExit('a module of the working directory')\n")
    reader, writer = os.pipe()
    overrides = ["run.name=interrupted", *SMALL, "training.steps=300", "evaluation.every_steps=300"]
    overrides.append(f"reward.function={DEMO / 'reward_func.py'}")
    process = start_mesh(
        demo, tmp_path, overrides, cwd=users, environment={**HOSTILE, "PYTHONPATH": str(REPOSITORY)}, output=writer
    )
    os.close(writer)
    folder = tmp_path / "interrupted"
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None, os.read(reader, 65_536).decode()
        assert time.monotonic() < deadline, service_logs(folder)
        time.sleep(0.5)
    os.close(reader)
    num_steps = len((folder / "metrics.jsonl").read_text().splitlines())
    while len((folder / "metrics.jsonl").read_text().splitlines()) < num_steps + 5:
        assert process.poll() is None, service_logs(folder)
        assert time.monotonic() < deadline, service_logs(folder)
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGHUP)
    run = finish_mesh(process, folder, timeout_s=90)
    assert run.exit_code == 128 + signal.SIGHUP
    assert run.accounting["state"] == "interrupted"
    assert run.accounting["num_groups"]["failed"] == 0
    assert "| the run | interrupted |" in (folder / "report.md").read_text()
    assert processes_of(folder) == []


def _fails_fast(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "rollmesh.cli", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_a_mistake_in_the_file_is_refused_before_anything_starts(demo: Path, tmp_path: Path) -> None:
    common = ["up", str(DEMO / "mesh.yaml"), "--set", f"run.directory={tmp_path}", "--set", f"model.path={demo}/model"]
    error = _fails_fast([*common, "--set", f"data.path={tmp_path}/nothing.jsonl"])
    assert error.startswith("error: data.path: ")
    assert not (tmp_path / "operators").exists()


def test_a_service_alone_says_what_it_misses(demo: Path) -> None:
    error = _fails_fast(["coordinator", "--config", str(DEMO / "mesh.yaml"), "--set", f"model.path={demo}/model"])
    assert "coordinator.address" in error or "replay.url" in error
