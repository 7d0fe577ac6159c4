"""The keeper: a process that runs a command and kills every process that the command leaves behind.

Users' code runs under a keeper.

::

    service ──── keeper ──── command ──── every process that the command starts, also in sessions of their own

The keeper is this file, run as a script in a fresh interpreter. The keeper waits until the command ends, or until
SIGTERM arrives. Linux also sends SIGTERM when the service dies. Then the keeper kills every process that the command
has left, and ends in the way the command ended. A keeper needs Linux. On other systems the command runs without a
keeper, and `end_kept` kills its process group.

The command gets a session of its own, so that a signal to the command's process group does not reach the keeper.
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
"""The longest time in which the keeper kills what is left. Only a process that is stuck in the kernel takes so long."""
_KEEPER_TIMEOUT_S = 5.0
"""Time for the keeper to end after SIGTERM."""
_KILL_TIMEOUT_S = 5.0
"""Time for the keeper to end after SIGKILL."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def kept(command: Sequence[str]) -> list[str]:
    """Return the command line that runs ``command`` under a keeper.

    Start this command line in the main thread, because the keeper ends when the thread that started the keeper ends.
    Start it with ``start_new_session``, and end it with `end_kept`. Name the descriptors that the command inherits in
    ``pass_fds``; the keeper itself closes them.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_kept(process: subprocess.Popen[bytes]) -> None:
    """Kill a kept command and all processes that the command has started.

    The call blocks for milliseconds. Where a process is stuck in the kernel, it blocks for at most ten seconds. A
    second call is harmless.
    """
    if sys.platform == "linux":
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KEEPER_TIMEOUT_S)
    if process.returncode is None:  # not reaped, so no other process group can have its number
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_TIMEOUT_S)


def main(arguments: Sequence[str]) -> None:
    """Run the keeper. The call ends the process.

    Args:
        arguments: the process id of the service that starts the keeper, then the command.
    """
    service, command = int(arguments[0]), arguments[1:]
    # When a process dies, its children go to the nearest subreaper above: the keeper gets every process to kill.
    _set_process_option(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    keeper = os.getpid()
    if (child := os.fork()) == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        _ask_for_signal_at_death_of(keeper, signal.SIGKILL)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two
            signal.signal(number, signal.SIG_DFL)
        os.execv(command[0], list(command))
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed already
                os.close(descriptor)
    _ask_for_signal_at_death_of(service, signal.SIGTERM)
    status = _wait(child)
    _sweep()
    _end_like(status)


def _wait(child: int) -> int:
    """Wait until the child ends or SIGTERM arrives. Return the child's wait status; after SIGTERM that of SIGKILL."""
    while signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
        while (ended := _reap())[0] > 0:
            if ended[0] == child:
                return ended[1]
    return int(signal.SIGKILL)


def _sweep() -> None:
    """Kill all processes below the keeper.

    When a child of the keeper dies, the children of that child become children of the keeper. So the keeper kills its
    children, one generation after another, until no child is left.
    """
    deadline = time.monotonic() + _SWEEP_TIMEOUT_S
    while (ended := _reap())[0] >= 0 and time.monotonic() < deadline:
        if ended[0] == 0:
            for child in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.001)


def _reap() -> tuple[int, int]:
    """Return the process id and the wait status of a child that has ended.

    The result is (0, 0) where all children live, and (-1, 0) where the process has no children.
    """
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return -1, 0


def _children() -> list[int]:
    """Return the process ids of the living children of this process."""
    me, found = os.getpid(), []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name before `)` may hold anything
            if int(parent) == me and state != b"Z":
                found.append(int(entry))
    return found


def _end_like(status: int) -> None:
    """End this process in the same way as the process with the wait status ``status``."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core file of a keeper tells nothing
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _ask_for_signal_at_death_of(parent: int, number: signal.Signals) -> None:
    """Let Linux send the signal ``number`` to this process when ``parent`` ends."""
    _set_process_option(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def _set_process_option(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
