"""Commands that leave no process behind, whatever they start. Users' code runs under a keeper.

::

    service ──── keeper ──── command ──── whatever the command starts, also daemons and sessions of their own

The keeper is this file, run as a script in a fresh interpreter. It waits until the command ends, or for SIGTERM, which
Linux also sends when the service dies. Then it kills every process that the command has left, and ends the way the
command ended. Linux only; elsewhere a kept command is the bare command, and ends with its process group.

The command gets a session of its own, so that what it sends to its process group does not reach the keeper.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_SWEEP_TIMEOUT_S = 3.0
"""Time that the keeper takes at most to kill what is left. Only a process that is stuck in the kernel takes so long."""
_KEEPER_TIMEOUT_S = 5.0
_KILL_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def kept(command: Sequence[str]) -> list[str]:
    """``command`` under a keeper. Start it in the main thread and with ``start_new_session``: the keeper sees the end
    of the thread that started it. End it with `end_kept`.

    Descriptors that the command is to inherit go in ``pass_fds`` as usual; the keeper keeps none of them.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_kept(process: subprocess.Popen[bytes]) -> None:
    """Kill a kept command and all that it has started. Blocks for milliseconds, at most for ten seconds, where a
    process is stuck in the kernel. Harmless to repeat."""
    if sys.platform == "linux":
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KEEPER_TIMEOUT_S)
    if process.returncode is None:  # not reaped, so the group's number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_TIMEOUT_S)


def main(arguments: Sequence[str]) -> None:
    """Arguments: the process id of whoever starts the keeper, and the command."""
    service, command = int(arguments[0]), arguments[1:]
    # When a process dies, its children go to the nearest subreaper above it: the keeper gets all that it has to end.
    _set_process_option(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    keeper = os.getpid()
    if (child := os.fork()) == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        _ask_for_signal_at_death_of(keeper, signal.SIGKILL)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        os.execv(command[0], list(command))
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with contextlib.suppress(OSError):  # the folder's own
                os.close(descriptor)
    _ask_for_signal_at_death_of(service, signal.SIGTERM)
    status = _wait(child)
    _sweep()
    _end_like(status)


def _wait(child: int) -> int:
    """Wait for the child's end, or for SIGTERM. Returns the child's wait status; SIGKILL's after SIGTERM."""
    while signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
        while (ended := _reap())[0] > 0:
            if ended[0] == child:
                return ended[1]
    return int(signal.SIGKILL)


def _sweep() -> None:
    """Kill the keeper's children. Theirs become the keeper's, one generation after another, until there are none."""
    deadline = time.monotonic() + _SWEEP_TIMEOUT_S
    while (ended := _reap())[0] >= 0 and time.monotonic() < deadline:
        if ended[0] == 0:
            for child in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.001)


def _reap() -> tuple[int, int]:
    """Process id and wait status of a child that has ended; (0, 0) where all live, (-1, 0) where there are none."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return -1, 0


def _children() -> list[int]:
    """Process ids of this process's children."""
    me, found = os.getpid(), []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]  # after the name, which may hold anything
            if int(parent) == me and state != b"Z":
                found.append(int(entry))
    return found


def _end_like(status: int) -> None:
    """End this process as the process with this wait status ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of the keeper would tell nothing
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _ask_for_signal_at_death_of(parent: int, number: signal.Signals) -> None:
    """Have Linux send this process ``number`` when ``parent`` ends."""
    _set_process_option(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _set_process_option(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
