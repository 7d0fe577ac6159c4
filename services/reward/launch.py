"""Starts and ends one child process, and checks its first frame. The calls block for a short time.

The child is a fresh interpreter, not a fork of a process that has gRPC loaded. The child runs `child.py` as a script
under a keeper (`rollmesh.aio.keeper`) and holds one end of a socket pair. ``-P`` keeps this folder off the child's
module search path, so that the user's ``import config`` finds the user's file.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from rollmesh.aio.keeper import end_kept, kept
from rollmesh.errors import ConfigError

LENGTH = struct.Struct("<I")
MAX_REPLY_BYTES = 8 * 1024 * 1024
"""The limit of a reply. A reply is a few numbers; a larger frame does not come from `child.py`."""
PLACE = "reward.function"

_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Launched:
    """A running child: the keeper's process, and the parent's end of the socket."""

    process: subprocess.Popen[bytes]
    connection: socket.socket

    def exit_reason(self, grace_s: float) -> str:
        """Return how the child ended, as the end of a sentence.

        A child that has closed its socket is about to end, so the method waits for ``grace_s`` at most.
        """
        deadline = time.monotonic() + grace_s
        # Look without reaping the process: `end` still needs the process group.
        while (ending := os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
            if time.monotonic() > deadline:
                return "closed its connection"
            time.sleep(0.002)
        if ending.si_code == os.CLD_EXITED:
            return f"ended with exit code {ending.si_status}"
        name = signal.Signals(ending.si_status).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def end(self) -> None:
        """Kill the child and the processes that it has started. Safe to repeat. The owner closes the socket."""
        end_kept(self.process)


def find_file(path: Path) -> Path:
    """Return the absolute path of the user's file.

    Raises:
        ConfigError: the file does not exist, or its name does not end in .py.
    """
    if path.is_dir():
        raise ConfigError(PLACE, f"{path} is a folder", "name the Python file that defines reward_func")
    if not path.is_file():
        raise ConfigError(PLACE, f"{path} does not exist", "name an existing Python file")
    if path.suffix != ".py":
        raise ConfigError(PLACE, f"{path} is not a Python file", "name a file that ends in .py")
    return path.resolve()


def launch(path: Path, output: int) -> Launched:
    """Start a child for the file. The child writes its standard output and standard error to the descriptor
    ``output``."""
    ours, theirs = socket.socketpair()
    try:
        command = [sys.executable, "-P", str(_CHILD), str(theirs.fileno()), str(path)]
        process = subprocess.Popen(
            kept(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Launched(process, ours)


def check_hello(path: Path, hello: Any) -> None:
    """Check the child's first frame.

    Raises:
        ConfigError: the file has no usable function.
    """
    fault = hello.get("fault") if isinstance(hello, dict) else f"disturbed the protocol with {hello!r:.100}"
    if fault:
        fix = hello.get("fix") if isinstance(hello, dict) else "leave the inherited descriptors alone"
        raise ConfigError(PLACE, f"{path} {fault}", fix or "correct the file")


def died_in_import(path: Path, reason: str) -> ConfigError:
    return ConfigError(PLACE, f"{path} cannot be imported: the process {reason}", "correct the file")


def import_timed_out(path: Path, timeout_s: float) -> ConfigError:
    problem = f"importing {path} took longer than {timeout_s:g} s"
    return ConfigError(PLACE, problem, "move slow work out of the import or raise reward.start_timeout_s")


def decode(body: bytes) -> Any:
    """Decode one msgpack value. Raises ValueError where ``body`` is anything else."""
    return msgpack.unpackb(body)
