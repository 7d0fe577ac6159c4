"""A kept command ends as if it were bare, and leaves no process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rollmesh.aio.keeper import end_kept, kept

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="keepers need Linux")

DAEMONS = """
import os, time
os.fork() and os._exit(0)
os.setsid()
os.fork()
os.write(1, b"%d\\n" % os.getpid())
time.sleep(600)
"""


@contextmanager
def running(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        kept([sys.executable, "-c", script, *arguments]), stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        end_kept(process)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    ("script", "returncode"),
    [
        ("", 0),
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV),
        ("import os; os.killpg(0, 15)", -signal.SIGTERM),
    ],
)
def test_a_kept_command_ends_as_the_bare_command_does(script: str, returncode: int) -> None:
    with running(script) as process:
        assert process.wait(20.0) == returncode


@pytest.mark.parametrize("last_words", ["", "time.sleep(600)", "signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
def test_daemons_end_when_the_command_ends_or_is_ended(last_words: str) -> None:
    script = f"import signal, subprocess, sys, time; subprocess.run([sys.executable, '-c', sys.argv[1]]); {last_words}"
    with running(script, DAEMONS) as process:
        assert process.stdout is not None
        daemons = [int(process.stdout.readline()) for _ in range(2)]
        if not last_words:
            process.wait(20.0)
    assert not [pid for pid in daemons if Path(f"/proc/{pid}").exists()]


def test_a_command_that_starts_processes_faster_than_one_can_look_is_ended_all_the_same(tmp_path: Path) -> None:
    script = """
import os, sys, time
for _ in range(20):
    if os.fork() == 0:
        for _ in range(200):
            if os.fork():
                os._exit(0)
            os.setsid()
            time.sleep(0.005)
        os._exit(0)
print("ready", flush=True)
time.sleep(600)
"""
    marker = str(tmp_path)
    with running(script, marker) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    assert not _processes_with(marker)


def test_the_command_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    marker = str(tmp_path)
    script = (
        "import subprocess, sys, time; from rollmesh.aio.keeper import kept\n"
        f"subprocess.Popen(kept([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}]))\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.communicate(timeout=20.0)
    deadline = time.monotonic() + 20.0
    while _processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _processes_with(marker)


def _processes_with(argument: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if argument.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
