"""Ends vLLM's processes when the rollout worker that owns them was killed: left alone they live on for ever."""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress

OWNER_VARIABLE = "ROLLMESH_ENGINE_OWNER"
"""Environment variable with the process id of the rollout worker."""


def follow_owner() -> None:
    """To be called in each of vLLM's worker processes: die with the owner, and take vLLM's engine process along.

    Does nothing in a process that has no owner on this machine.
    """
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is not None:
        threading.Thread(target=_follow, args=(int(owner), os.getppid()), name="owner", daemon=True).start()


def _follow(owner: int, parent: int) -> None:
    """``parent`` is the engine's process, or the owner itself where vLLM works inside the engine's process."""
    with suppress(ProcessLookupError):  # it is gone already
        handle = os.pidfd_open(owner)
        select.select([handle], [], [])  # readable when the process has ended
    if parent != owner and os.getppid() == parent:
        with suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os._exit(1)
