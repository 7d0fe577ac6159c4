"""Ends vLLM's processes when their rollout worker was killed. Without this, the processes would live on for ever."""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress

OWNER_VARIABLE = "ROLLMESH_ENGINE_OWNER"
"""The environment variable that holds the process id of the rollout worker."""


def follow_owner() -> None:
    """End this process and vLLM's engine process when the owner ends. Call this in each of vLLM's worker processes.

    Do nothing in a process that has no owner on this machine.
    """
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is not None:
        threading.Thread(target=_follow, args=(int(owner), os.getppid()), name="owner", daemon=True).start()


def _follow(owner: int, parent: int) -> None:
    """Wait for the owner's end, then end the processes.

    Args:
        owner: the process id of the rollout worker.
        parent: the process id of vLLM's engine process, or the owner's where this process is the engine process.
    """
    with suppress(ProcessLookupError):  # the owner is gone already
        handle = os.pidfd_open(owner)
        select.select([handle], [], [])  # readable when the process has ended
    if parent != owner and os.getppid() == parent:
        with suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os._exit(1)
