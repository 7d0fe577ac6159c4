"""Bad input at the command line gives one sentence on stderr and an exit code, and leaves no process running.

The unit tests of a check test its sentence. These tests show that the sentence reaches the user before an engine
starts.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import yaml

from rollmesh.replay.connection import connect_blocking
from rollmesh.replay.embedded import find_binary
from tests.integration.mesh_runs import DEMO, REPOSITORY, MeshRun, finish_mesh, processes_of, start_mesh

IN_TIME_S = 10.0
"""Time until the sentence appears on a machine that is not busy. The tests allow six times as long."""


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    error: str
    """The sentence after "error: "."""
    output: str


@pytest.fixture
def runs(tmp_path: Path, demo: Path) -> Path:
    """Return a folder for runs, which does not exist yet, beside a correct mesh file."""
    tree = yaml.safe_load((DEMO / "mesh.yaml").read_text())
    tree["model"]["path"] = str(demo / "model")
    tree["data"]["path"] = str(demo / "data" / "train.jsonl")
    tree["evaluation"]["data"]["path"] = str(demo / "data" / "heldout.jsonl")
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "runs"


def _mesh_file(runs: Path) -> str:
    return str(runs.parent / "mesh.yaml")


def _run(arguments: list[str], runs: Path, *overrides: str) -> Outcome:
    """Run a command that has to fail with one sentence and an exit code, and without a process left."""
    command = [sys.executable, "-m", "rollmesh.cli", *arguments]
    for override in (f"run.directory={runs}", *overrides):
        command += ["--set", override]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=6 * IN_TIME_S, check=False)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.returncode != 0
    assert processes_of(runs) == []
    return Outcome(result.returncode, lines[0].removeprefix("error: "), result.stdout)


def _up(runs: Path, *overrides: str) -> str:
    """Return the sentence of `rollmesh up` about a wrong mesh. The command must not create the folder for runs."""
    outcome = _run(["up", _mesh_file(runs)], runs, *overrides)
    assert outcome.exit_code == 2
    assert not runs.exists()
    return outcome.error


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("learner.optimizer.lrr=1", "learner.optimizer.lrr: is not a known key; did you mean 'lr'?"),
        ("learner.num_ranks=3", "training.prompts_per_step: 32 is not divisible by learner.num_ranks 3"),
        ("training.slots=3", "training.slots: 3 open groups can never fill a batch"),
        ("reference=null", "algorithm.kl.coef: 0.001 needs reference log-probabilities"),
        ("data.path=nowhere.jsonl", "data.path: nowhere.jsonl does not exist"),
        ("model.path=nowhere", "model.path: nowhere does not exist"),
        ("reward.function=nowhere.py", "reward.function: nowhere.py does not exist"),
        ("rollout.engine.extra.nonsense=1", "rollout.engine.extra.nonsense: is not an argument of vLLM's"),
        ("replay.url=redis://127.0.0.1:1/0", "replay.url: redis://127.0.0.1:1/0 cannot be used"),
        ("run.directory=/proc/nowhere", "run.directory: /proc/nowhere cannot be used for the run folder"),
    ],
)
def test_up_refuses_what_cannot_work(runs: Path, override: str, sentence: str) -> None:
    assert _up(runs, override).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "train.jsonl has no rows"),
        (
            '{"input": "a", "label": 1}\n{"inputt": "b"}\n',
            "train.jsonl, line 2: has no key 'input'; its keys are inputt",
        ),
        ('{"input": "a", "label": 1}\n\n{oops\n', "train.jsonl, line 3: is not JSON"),
        (
            '{"input": "%s", "label": 1}\n' % ("1 " * 20),
            "train.jsonl, line 1: has 20 tokens, but model.max_length",
        ),
    ],
    ids=["empty", "no-key", "not-json", "overlong"],
)
def test_a_dataset_that_cannot_be_used_is_refused_with_its_line(
    runs: Path, tmp_path: Path, text: str, sentence: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    assert sentence in _up(runs, f"data.path={path}")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1\n", "has no reward_func (it defines no functions); define `def reward_func(queries, prompts, labels)`"),
        ("import nothing_of_that_name\n", "cannot be imported (ModuleNotFoundError: No module named"),
        ("import time\ntime.sleep(1000)\n", "took longer than 2 s"),
        ("import os\nos._exit(3)\n", "cannot be imported: the process ended with exit code 3"),
    ],
    ids=["no-function", "import-error", "sleeps", "exits"],
)
def test_a_reward_file_that_cannot_be_used_is_refused(runs: Path, tmp_path: Path, code: str, sentence: str) -> None:
    path = tmp_path / "reward.py"
    path.write_text(code)
    limit = ["reward.start_timeout_s=2"] if "sleep" in code else []
    error = _up(runs, f"reward.function={path}", *limit)
    assert error.startswith("reward.function: ")
    assert sentence in error


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise KeyError('lost')", "reward_func raised KeyError: 'lost' (reward.py:2); correct it, or set"),
        ("return [1.0, 2.0]", "reward_func returned [1.0, 2.0]: 2 values for 1 sample; correct it, or set"),
        ("return {'rewards': [float('nan')]}", "rewards: nan is not a finite float32; correct it, or set"),
        (
            "import time; time.sleep(1000)",
            "reward_func took longer than the 2 s of reward.timeout_s; make it faster or",
        ),
    ],
    ids=["raises", "wrong-length", "nan", "never-returns"],
)
def test_a_reward_function_that_gives_no_reward_is_refused(
    runs: Path, tmp_path: Path, body: str, sentence: str
) -> None:
    path = tmp_path / "reward.py"
    path.write_text(f"def reward_func(queries, prompts, labels):\n    {body}\n")
    error = _up(runs, f"reward.function={path}", "reward.timeout_s=2")
    assert error.startswith(f"reward.function: {path} gives no reward for ")
    assert sentence in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "rollmesh: the following arguments are required: command"),
        (["upp"], "rollmesh: argument command: invalid choice: 'upp'"),
        (["up"], "rollmesh up: the following arguments are required: FILE"),
        (["report", "/nowhere"], "/nowhere: holds no mesh.yaml, or neither accounting.json nor a metrics.jsonl"),
        (["config", "check", "/nowhere.yaml"], "/nowhere.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_one_sentence_too(arguments: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "rollmesh.cli", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {sentence}")
    assert len(result.stderr.splitlines()) == 1


@contextlib.contextmanager
def _redis(folder: Path, *options: str) -> Iterator[str]:
    """Yield the URL of a real Redis on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    folder.mkdir()
    command = [str(find_binary()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        client = connect_blocking(url, 1.0)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.exceptions.RedisError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        client.close()
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--replicaof", "127.0.0.1", "1"], "is a replica, which accepts no writes; name its primary"),
        (
            ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"],
            "drops keys when its memory is full (maxmemory-policy allkeys-lru)",
        ),
    ],
    ids=["replica", "evicting"],
)
def test_a_redis_that_cannot_hold_a_run_is_refused(
    runs: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    with _redis(tmp_path / "redis", *options) as url:
        error = _up(runs, f"replay.url={url}")
    assert error.startswith(f"replay.url: {url} ")
    assert sentence in error


@pytest.mark.parametrize("service", ["coordinator", "rollout", "reward", "reference", "learner"])
def test_a_service_that_is_started_alone_names_the_address_it_misses(runs: Path, service: str) -> None:
    outcome = _run([service, "--config", _mesh_file(runs)], runs)
    assert outcome.exit_code == 2
    assert outcome.error.startswith(("coordinator.address: ", "replay.url: "))


def test_a_service_says_that_its_port_is_in_use(runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        outcome = _run(["reward", "--config", _mesh_file(runs)], runs, f"reward.address={address}")
    assert outcome.error.startswith(f"reward.address: '{address}' is in use by another process")


def test_the_status_of_a_mesh_that_does_not_run_says_so(runs: Path) -> None:
    never = _run(["status", "--config", _mesh_file(runs)], runs)
    assert never.exit_code == 2
    assert "there is no run in" in never.error
    over = _run(["status", "--config", _mesh_file(runs)], runs, "coordinator.address=127.0.0.1:1")
    assert over.exit_code == 1
    assert over.error.startswith("run operators: no coordinator answers at 127.0.0.1:1; ")


def test_what_is_not_a_run_folder_is_left_alone(runs: Path) -> None:
    precious = runs / "operators" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("keep me")
    outcome = _run(["up", _mesh_file(runs), "--overwrite"], runs)
    assert outcome.error.startswith(f"run.name: {precious.parent} exists and is not a run folder")
    assert precious.read_text() == "keep me"


def _fails_while_running(demo: Path, runs: Path, *overrides: str) -> tuple[MeshRun, str]:
    small = ["training.prompts_per_step=8", "training.samples_per_prompt=4", "training.steps=4", "evaluation=null"]
    small += ["algorithm.kl.coef=0", "rollout.scoring_attempts=1", "coordinator.max_attempts=1", "run.name=bad"]
    run = finish_mesh(start_mesh(demo, runs, [*small, *overrides]), runs / "bad", timeout_s=200)
    assert run.exit_code == 1, run.output
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert processes_of(runs) == []
    return run, errors[0]


@pytest.mark.mesh
@pytest.mark.timeout(400)
def test_a_reward_function_that_begins_to_fail_ends_the_run_with_its_reason(
    demo: Path, runs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "reward.py"
    path.write_text(
        "calls = []\n"
        "def reward_func(queries, prompts, labels):\n"
        "    calls.append(queries)\n"
        "    assert len(calls) <= 64, 'the judge is gone'\n"
        "    return {'rewards': [len(calls) % 2]}\n"
    )
    _, error = _fails_while_running(demo, runs, f"reward.function={path}")
    reason = (
        "the reward server gave no reward in 1 try: reward_func raised AssertionError: the judge is gone (reward.py:4)"
    )
    assert f"{reason}; correct the cause, or raise rollout.scoring_attempts" in error


@pytest.mark.mesh
@pytest.mark.timeout(400)
def test_a_setting_that_only_the_engine_can_judge_is_named(demo: Path, runs: Path) -> None:
    run, error = _fails_while_running(demo, runs, "rollout.engine.extra.block_size=many")
    assert error.startswith("error: rollout-0 exited with 2: rollout.engine: vLLM refuses it (block_size = 'many'")
    assert not (run.folder / "metrics.jsonl").exists()
