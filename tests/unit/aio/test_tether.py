"""Nothing outlives the process that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rollmesh.aio.tether import tethered

REPOSITORY = Path(__file__).resolve().parents[3]
STARTER = """
import subprocess, sys
from rollmesh.aio.tether import tethered

child = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
subprocess.Popen(tethered(child), start_new_session=True).wait()
"""


def test_a_tethered_process_ends_with_a_starter_that_is_killed() -> None:
    command = [sys.executable, "-c", STARTER]
    starter = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "up\n"
    starter.kill()
    starter.wait(10)
    # The child holds the other end of the pipe: it closes with the child.
    assert starter.stdout.read() == ""
    starter.stdout.close()


def test_a_tethered_command_runs_as_it_would_alone() -> None:
    result = subprocess.run(tethered(["sh", "-c", "echo $0; exit 3", "x"]), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (3, "x\n")
