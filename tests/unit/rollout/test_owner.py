"""vLLM's processes end when the rollout worker that owns them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from services.rollout.owner import OWNER_VARIABLE

_WORKER = "import time; from services.rollout.owner import follow_owner; follow_owner(); print('up'); time.sleep(60)"
_ENGINE = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-u", "-c", {_WORKER!r}])
print(worker.pid)
worker.wait(60)
"""
_OWNER = f"""
import os, subprocess, sys
os.environ[{OWNER_VARIABLE!r}] = str(os.getpid())
engine = subprocess.Popen([sys.executable, "-u", "-c", sys.argv[1]])
print(engine.pid)
engine.wait(60)
"""


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that owns other processes, and the ids of the processes, once the innermost process follows its
    owner."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _OWNER, request.param], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    ids = []
    for line in process.stdout:
        if line == "up\n":
            break
        ids.append(int(line))
    yield process, ids
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait(10)


def is_running(process_id: int) -> bool:
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("owner", [_ENGINE, _WORKER], indirect=True, ids=["worker-under-engine", "worker-is-engine"])
def test_all_end_when_the_owner_is_killed_and_none_before(owner: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, ids = owner
    time.sleep(0.2)
    assert all(is_running(process_id) for process_id in ids)
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 10
    while any(is_running(process_id) for process_id in ids):
        assert time.monotonic() < deadline, "a process outlived its owner"
        time.sleep(0.05)
