"""`rollmesh chaos` strikes the processes of its run and no others, and lets what it stopped go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from rollmesh.cli import CHAOS_MOMENTS, main
from services.launcher.chaos import Strike, draw
from services.launcher.chaos_moments import MOMENTS
from services.launcher.chaos_processes import FoundProcess, find_processes, read_process

DEADLINE_S = 20.0
PRETENDED_CLI = """
import subprocess, sys, time
if "rollout" in sys.argv:
    subprocess.Popen(["VLLM::EngineCore", "60"], executable="/bin/sleep")
time.sleep(60)
"""


class PretendedRun:
    """Processes with the command lines, environments and folders of a run's processes; they only sleep.

    Args:
        root: a folder for the run folder and for the programs.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "runs" / "one"
        (self.folder / "redis").mkdir(parents=True)
        (self.folder / "mesh.yaml").touch()
        self._programs = root / "programs"
        (self._programs / "rollmesh").mkdir(parents=True)
        (self._programs / "rollmesh" / "__init__.py").touch()
        (self._programs / "rollmesh" / "cli.py").write_text(PRETENDED_CLI)
        self._started: list[subprocess.Popen[bytes]] = []

    def start_service(
        self, service: str, name: str, environment: Mapping[str, str] | None = None, config: Path | None = None
    ) -> int:
        """Start a pretended service. Return its process id."""
        command = [sys.executable, "-P", "-m", "rollmesh.cli", service]
        command += ["--config", str(config or self.folder / "mesh.yaml"), "--name", name]
        variables = {"PYTHONPATH": str(self._programs), "ROLLMESH_LAUNCHER_PID": str(os.getpid())}
        return self._start(command, self.folder, {**variables, **(environment or {})})

    def start_redis(self) -> int:
        """Start a pretended Redis. Return its process id."""
        program = self._programs / "valkey-server"
        shutil.copy("/bin/sleep", program)
        return self._start([str(program), "60"], self.folder / "redis", {})

    def _start(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> int:
        process = subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment}, start_new_session=True)
        self._started.append(process)
        return process.pid

    def exit_code(self, pid: int) -> int:
        return next(process for process in self._started if process.pid == pid).wait(DEADLINE_S)

    def end(self) -> None:
        for process in self._started:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait(DEADLINE_S)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[PretendedRun]:
    pretended = PretendedRun(tmp_path)
    try:
        yield pretended
    finally:
        for processes in find_processes(pretended.folder).values():
            for process in processes:
                process.send(signal.SIGKILL) if process.pid != os.getpid() else None
        pretended.end()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pids(found: Mapping[str, Sequence[FoundProcess]]) -> dict[str, list[int]]:
    return {name: [process.pid for process in processes] for name, processes in found.items()}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_processes_are_found_by_the_run_folder_and_have_the_names_of_members(run: PretendedRun) -> None:
    reward = run.start_service("reward", "reward")
    rollout = run.start_service("rollout", "rollout-1")
    redis = run.start_redis()
    wait_for(lambda: {"rollout-1:engine", "redis"} <= find_processes(run.folder).keys())
    found = find_processes(run.folder)
    (engine,) = found.pop("rollout-1:engine")
    assert engine.parent == rollout
    assert pids(found) == {"redis": [redis], "reward": [reward], "rollout-1": [rollout], "up": [os.getpid()]}


def test_ranks_have_names_of_their_own_and_belong_to_the_learner(run: PretendedRun) -> None:
    ranks = [run.start_service("learner", "learner", {"RANK": str(rank)}) for rank in range(2)]
    wait_for(lambda: len(find_processes(run.folder).get("learner", [])) == 2)
    found = pids(find_processes(run.folder))
    assert sorted(found["learner"]) == sorted(ranks)
    assert found["learner:rank-0"] == ranks[:1]
    assert found["learner:rank-1"] == ranks[1:]


def test_a_process_of_another_run_is_never_found(run: PretendedRun, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "mesh.yaml").touch()
    stranger = run.start_service("reward", "reward", config=other / "mesh.yaml")
    wait_for(lambda: find_processes(other).get("reward"))
    assert find_processes(run.folder) == {}
    assert main(["chaos", str(run.folder), "--kill", "reward"]) == 2
    assert state(stranger) in "SR"


def test_a_process_id_that_another_process_has_now_gets_no_signal(run: PretendedRun) -> None:
    pid = run.start_service("reward", "reward")
    process = read_process(pid)
    assert process is not None
    earlier = FoundProcess(pid, process.parent, process.started - 1, process.arguments)
    assert not earlier.send(signal.SIGKILL)
    assert state(pid) in "SRD"


def test_a_kill_says_the_pid_and_a_name_that_does_not_exist_is_answered_with_the_names(
    run: PretendedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = run.start_service("reward", "reward")
    wait_for(lambda: find_processes(run.folder).get("reward"))
    assert main(["chaos", str(run.folder), "--kill", "rewards"]) == 2
    assert "no process of the run is called 'rewards'; choose reward, up" in capsys.readouterr().err
    assert main(["chaos", str(run.folder), "--kill", "reward", "--dry-run"]) == 0
    assert f"would kill reward (pid {pid})" in capsys.readouterr().out
    assert main(["chaos", str(run.folder), "--kill", "reward"]) == 0
    assert run.exit_code(pid) == -signal.SIGKILL
    printed = capsys.readouterr().out
    assert f"kill reward (pid {pid})" in printed
    assert "1 strike (1 kill)" in printed


def test_a_frozen_process_goes_on_although_the_command_is_interrupted(run: PretendedRun) -> None:
    pid = run.start_service("reward", "reward")
    wait_for(lambda: find_processes(run.folder).get("reward"))
    command = [sys.executable, "-m", "rollmesh.cli", "chaos", str(run.folder), "--freeze", "reward", "--for", "60"]
    chaos = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: state(pid) == "T")
    chaos.send_signal(signal.SIGTERM)
    output, _ = chaos.communicate(timeout=DEADLINE_S)
    assert chaos.returncode == 128 + signal.SIGTERM
    assert "1 strike (1 freeze), ended by SIGTERM" in output
    assert state(pid) == "S"


def test_a_slow_process_stands_still_most_of_the_time_and_goes_on_afterwards(run: PretendedRun) -> None:
    pid = run.start_service("reward", "reward")
    wait_for(lambda: find_processes(run.folder).get("reward"))
    arguments = ["--slow", "reward", "--by", "5", "--for", "1"]
    chaos = subprocess.Popen([sys.executable, "-m", "rollmesh.cli", "chaos", str(run.folder), *arguments])
    states = []
    while chaos.poll() is None:
        states.append(state(pid))
        time.sleep(0.005)
    assert states.count("T") > states[states.index("T") :].count("S")
    assert state(pid) == "S"


def test_the_seed_determines_the_strikes_and_they_end_in_time() -> None:
    names = ["redis", "reward", "reference"]
    strikes = draw(names, 3, 20.0, 600.0)
    assert strikes == draw(list(reversed(names)), 3, 20.0, 600.0)
    assert strikes != draw(names, 4, 20.0, 600.0)
    assert sum(strike.wait_s + strike.duration_s for strike in strikes) <= 600
    assert {strike.name for strike in strikes} == set(names)
    assert {strike.action for strike in strikes} == {"kill", "freeze", "slow"}
    assert all((strike.duration_s == 0) == (strike.action == "kill") for strike in strikes)


def test_random_strikes_are_announced_and_end_with_the_run(
    run: PretendedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = run.start_service("reward", "reward")
    wait_for(lambda: find_processes(run.folder).get("reward"))
    arguments = ["--random", "--seed", "1", "--every", "0.1", "--for", "60"]
    assert main(["chaos", str(run.folder), *arguments]) == 0
    assert run.exit_code(pid) == -signal.SIGKILL
    printed = capsys.readouterr().out
    assert printed.startswith("seed 1, among reward\n")
    assert "the run is over" in printed


def test_a_folder_without_a_run_and_a_run_that_is_over_are_refused(
    run: PretendedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chaos", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["chaos", str(run.folder)]) == 2
    assert "has no process of yours on this machine" in capsys.readouterr().err


def test_the_help_names_the_moments_that_can_be_watched() -> None:
    assert list(CHAOS_MOMENTS) == list(MOMENTS)


def test_a_strike_reads_as_a_sentence() -> None:
    assert str(Strike("redis", "kill")) == "kill redis"
    assert str(Strike("redis", "freeze", 5.0)) == "freeze redis for 5.0 s"
    assert str(Strike("redis", "slow", 5.0, 4.0)) == "slow redis 4.0 times slower for 5.0 s"
