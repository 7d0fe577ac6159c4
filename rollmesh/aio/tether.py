"""Processes that end with their starter, however the starter ends: after SIGKILL nobody is left to stop them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# This program runs in the new process, asks for the signal, and becomes the command. The kernel does not report a
# parent that died before the request; therefore the program then checks that the parent still lives. A `preexec_fn`
# would fork, which gRPC does not bear.
_TIE_AND_EXEC = """
import ctypes, os, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(sys.argv[2]), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[3], sys.argv[3:])
"""


def tethered(command: Sequence[str], *, should_kill: bool = False) -> list[str]:
    """Return a command that runs ``command`` and gets a signal when its parent dies (Linux).

    For the kernel, the parent is the *thread* that starts the command, not the process of that thread.

    Args:
        command: the program and its arguments.
        should_kill: whether the signal is SIGKILL, for a program that may not react to SIGTERM in time; else SIGTERM.
    """
    number = signal.SIGKILL if should_kill else signal.SIGTERM
    return [sys.executable, "-I", "-S", "-c", _TIE_AND_EXEC, str(os.getpid()), str(int(number)), *command]
