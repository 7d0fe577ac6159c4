"""Processes that end with the one that started them, however that ends: SIGKILL leaves nobody to stop them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Runs in the new process and becomes the command. It looks at its parent after asking for the signal, because a parent
# that died before would never be reported. Not a `preexec_fn`: that forks, which gRPC does not bear.
_TIE_AND_EXEC = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tethered(command: Sequence[str]) -> list[str]:
    """``command`` such that it gets SIGTERM when this process dies (Linux). Start it in the main thread: it is the
    starting thread's end that counts."""
    return [sys.executable, "-c", _TIE_AND_EXEC, str(os.getpid()), *command]
