"""The ranks of a learner are processes that start together and end together, however one of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollmesh.errors import EXIT_START_AGAIN
from services.learner.rank_processes import rank_environment

REPOSITORY = Path(__file__).resolve().parents[3]
PARENT = """
import sys
from rollmesh.errors import StartAgainError
from services.learner.rank_processes import run_ranks

try:
    code = run_ranks([sys.executable, "-u", "-c", sys.argv[1]], 2, "learner")
except StartAgainError as error:
    print(error)
    code = 75
sys.exit(code)
"""
RANK = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), os.environ["FOLDER"]
def end(*_):
    open(folder + f"/stopped-{rank}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
with open(folder + f"/part-{rank}", "w") as file:
    file.write(str(os.getpid()))
os.rename(folder + f"/part-{rank}", folder + f"/pid-{rank}")
while not os.path.exists(folder + f"/pid-{1 - rank}"):
    time.sleep(0.01)
"""
WAITS = "time.sleep(60)\n"


class _Learner:
    """A learner of two ranks that run one program."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, RANK + program],
            cwd=REPOSITORY,
            env={**os.environ, "FOLDER": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """Return the process ids of the ranks, once both have started."""
        files = [self.folder / f"pid-{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + 30
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str]:
        """Wait for the end of the learner. Return its exit code and its output."""
        output, _ = self.process.communicate(timeout=40)
        return self.process.returncode, output


def _is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def _until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(_is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived the learner"
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for file in tmp_path.glob("pid-*"):
        if not _is_gone(int(file.read_text())):
            os.kill(int(file.read_text()), signal.SIGKILL)


def test_a_learner_whose_ranks_all_succeed_succeeds(folder: Path) -> None:
    assert _Learner(folder, "time.sleep(0.3 * rank)\n").end() == (0, "")


def test_a_killed_rank_ends_all_ranks_and_asks_for_a_new_start(folder: Path) -> None:
    learner = _Learner(folder, WAITS)
    pids = learner.pids()
    os.kill(pids[1], signal.SIGKILL)
    assert learner.end() == (EXIT_START_AGAIN, "rank 1 was killed by signal 9; the other ranks were ended\n")
    _until_gone(pids)
    assert not list(folder.glob("stopped-*"))


def test_a_rank_that_fails_by_itself_ends_all_ranks_with_its_own_exit_code(folder: Path) -> None:
    learner = _Learner(folder, "if rank: sys.exit(2)\n" + WAITS)
    pids = learner.pids()
    assert learner.end() == (2, "")
    _until_gone(pids)


def test_a_rank_that_lost_another_is_not_the_cause(folder: Path) -> None:
    program = f"if rank == 0: sys.exit({EXIT_START_AGAIN})\ntime.sleep(0.5); sys.exit(1)\n"
    assert _Learner(folder, program).end() == (1, "")


def test_ranks_that_lost_each_other_ask_for_a_new_start(folder: Path) -> None:
    learner = _Learner(folder, f"sys.exit({EXIT_START_AGAIN})\n")
    code, output = learner.end()
    assert code == EXIT_START_AGAIN
    assert "lost another rank; the other ranks were ended" in output


def test_a_stop_signal_is_passed_on_to_all_ranks(folder: Path) -> None:
    learner = _Learner(folder, WAITS)
    learner.pids()
    learner.process.send_signal(signal.SIGTERM)
    assert learner.end() == (143, "")
    assert len(list(folder.glob("stopped-*"))) == 2


@pytest.mark.parametrize("is_frozen", [False, True])
def test_no_rank_outlives_a_learner_that_is_killed(folder: Path, is_frozen: bool) -> None:
    learner = _Learner(folder, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS)
    pids = learner.pids()
    if is_frozen:
        os.kill(pids[1], signal.SIGSTOP)
    learner.process.kill()
    _until_gone(pids)


def test_each_rank_gets_its_place_and_is_tied_to_the_learner_alone() -> None:
    around = {"HOME": "/home/me", "ROLLMESH_LAUNCHER_PID": "17", "OMP_NUM_THREADS": "4"}
    environment = rank_environment(around, 1, 2, 4567)
    assert environment == {
        "HOME": "/home/me",
        "OMP_NUM_THREADS": "4",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4567",
    }
    assert rank_environment({}, 0, 2, 4567)["OMP_NUM_THREADS"] == "1"
