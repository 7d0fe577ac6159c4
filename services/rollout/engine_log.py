"""Explains why vLLM ended: finds the first exception that vLLM's processes printed, and adds advice where known.

vLLM's processes write to the standard error of this process. Under `rollmesh up` standard error is a file, and this
module reads the file. On a terminal or a pipe the user sees the cause already.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

from rollmesh.errors import RollMeshError, StartAgainError

TAIL_BYTES = 256 * 1024
_TRACEBACK = "Traceback (most recent call last):"
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
"""The marks that vLLM puts before each line: process, level, time and source."""
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning|Timeout|Failure)\b(?::.*)?$")
_LATER_COUNTS = "During handling of the above exception, another exception occurred:"
_SAYS_LITTLE = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed")
_KILLED = re.compile(r"Failed core proc\(s\): .*: -(\d+)")
"""vLLM's note of the processes that ended, with exit codes. A negative code is the signal that ended the process."""

_HINTS = (
    (r"head.?size|head.?dim", "the attention kernels lack this head size; use another model, or a GPU"),
    (r"too many open files|Errno 24\b|Cannot resolve 127\.0\.0\.1", "raise the limit of open files (ulimit -n)"),
    (r"SIGKILL", "the kernel does that when memory runs out; give it more, or lower rollout.engine.cpu_kv_cache_gib"),
    (r"out of memory|less than requested memory|cannot allocate memory|bad_alloc|MemoryError|DefaultCPUAllocator",
     "give it more memory, or lower rollout.engine.cpu_kv_cache_gib, gpu_memory_utilization or max_num_seqs"),
    (r"max_model_len|max seq len|maximum model length|No available memory for the cache blocks|KV cache",
     "lower model.max_length, or give the KV cache more memory"),
    (r"not supported for now|are not supported|does not recognize this architecture|no vLLM implementation",
     "vLLM does not know this architecture; use another model or a newer vLLM"),
    (r"address already in use|Errno 98\b|EADDRINUSE", "another process has the port; start again, or end that process"),
    (r"No space left on device|Errno 28\b", "make room on the disk, or in /dev/shm"),
)  # fmt: skip


@dataclass(frozen=True)
class EngineLog:
    """The part of this process' standard error that begins when an engine is started.

    Attributes:
        path: the file of standard error; None where standard error is no file.
        start: the size of the file in bytes at the time of the start.
    """

    path: Path | None
    start: int = 0

    @classmethod
    def begin(cls) -> EngineLog:
        """Return the log that begins now."""
        try:
            status = os.fstat(2)
            path = Path(os.readlink("/proc/self/fd/2"))
        except OSError:
            return cls(None)
        return cls(path, status.st_size) if stat.S_ISREG(status.st_mode) and path.exists() else cls(None)

    def explain(self, problem: str, error: BaseException) -> str:
        """Return one sentence: ``problem``, the exception at its root, advice, and the place of further details.

        Args:
            problem: the event, such as "vLLM did not start".
            error: the exception that this process caught. The exception counts as the cause where the log shows none,
                unless the exception points to another error.
        """
        cause = self._printed_cause() or _own_cause(error)
        advice = hint(cause)
        place = "the output above says more" if self.path is None else f"see {self.path}"
        return "; ".join(part for part in (f"{problem}: {cause:.400}" if cause else problem, advice, place) if part)

    def failed_start(self, error: BaseException) -> RollMeshError:
        """Return the error that describes a start that failed with ``error``.

        A process of vLLM that a signal killed, as the kernel does for lack of memory, may live at the next start.
        """
        kind = StartAgainError if _KILLED.search(str(error)) else RollMeshError
        return kind(self.explain("vLLM did not start", error))

    def _printed_cause(self) -> str:
        if self.path is None:
            return ""
        with self.path.open("rb") as file:
            file.seek(max(self.start, self.path.stat().st_size - TAIL_BYTES))
            return root_cause(file.read().decode(errors="replace"))


def _own_cause(error: BaseException) -> str:
    killed = _KILLED.search(str(error))
    if killed:
        return f"a process of vLLM was ended by {signal.Signals(int(killed[1])).name}"
    line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(".: ")
    return "" if _SAYS_LITTLE.search(line) else line


def root_cause(text: str) -> str:
    """Return the type and the first message line of the exception at the root of the first traceback in a log.

    A traceback shows the root first, and then the exceptions that the root caused. Where the code raised an exception
    while it handled another exception, the later exception is the code's explanation and counts.

    Returns:
        Empty where the log has no traceback, or only tracebacks of errors that point to another error.
    """
    cause, is_open, counts_next = "", False, False
    for raw in text.splitlines():
        line = _PREFIX.sub("", raw)
        if line.strip() == _TRACEBACK:
            is_open = True
        elif line.strip() == _LATER_COUNTS:
            counts_next = True
        elif is_open and _EXCEPTION.match(line):
            is_open = False
            if (not cause or counts_next) and not _SAYS_LITTLE.search(line):
                cause = line.strip().rstrip(".:")
            counts_next = False
    return cause


def hint(cause: str) -> str:
    """Return advice for a cause; empty where no advice is known."""
    return next((advice for pattern, advice in _HINTS if re.search(pattern, cause, re.IGNORECASE)), "")
