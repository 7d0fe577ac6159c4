"""Why vLLM ended: the first exception that its processes printed, with what to do about it where that is known.

vLLM's processes write to the standard error of this process. Under `rollmesh up` that is a file, which can be read
again; on a terminal or a pipe the cause stands in front of the reader already.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 256 * 1024
_TRACEBACK = "Traceback (most recent call last):"
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
"""vLLM's marks of process, level, time and source before each line."""
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning|Timeout|Failure)\b(?::.*)?$")
_LATER_COUNTS = "During handling of the above exception, another exception occurred:"
_SAYS_LITTLE = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed")
_KILLED = re.compile(r"Failed core proc\(s\): .*: -(\d+)")
"""vLLM's note of the processes that ended, with exit codes: a negative one is the signal that ended it."""

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
        path: the file; None where standard error is none.
        start: bytes that were in it before.
    """

    path: Path | None
    start: int = 0

    @classmethod
    def begin(cls) -> EngineLog:
        """From here on."""
        try:
            status = os.fstat(2)
            path = Path(os.readlink("/proc/self/fd/2"))
        except OSError:
            return cls(None)
        return cls(path, status.st_size) if stat.S_ISREG(status.st_mode) and path.exists() else cls(None)

    def explain(self, problem: str, error: BaseException) -> str:
        """One sentence: ``problem``, the exception at the root of it, what to do, and where to read more.

        Args:
            problem: what happened, such as "vLLM did not start".
            error: what arrived here. It is the cause where the log shows none and it does not point to another one.
        """
        cause = self._printed_cause() or _own_cause(error)
        advice = hint(cause)
        place = "what it printed above says more" if self.path is None else f"see {self.path}"
        return "; ".join(part for part in (f"{problem}: {cause:.400}" if cause else problem, advice, place) if part)

    def _printed_cause(self) -> str:
        if self.path is None:
            return ""
        with self.path.open("rb") as file:
            file.seek(max(self.start, self.path.stat().st_size - TAIL_BYTES))
            return root_cause(file.read().decode(errors="replace"))


def _own_cause(error: BaseException) -> str:
    killed = _KILLED.search(str(error))
    if killed:
        return f"a process of it was ended by {signal.Signals(int(killed[1])).name}"
    line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(".: ")
    return "" if _SAYS_LITTLE.search(line) else line


def root_cause(text: str) -> str:
    """The exception at the root of the first traceback in a log: its type and the first line of its message.

    A traceback shows the root first, and then what was raised because of it. Where an exception was raised while
    another one was handled, the later one is what the code had to say about it.

    Returns:
        Empty where there is no traceback, or only of errors that point to another one.
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
    """What to do about a cause; empty where that is not known."""
    return next((advice for pattern, advice in _HINTS if re.search(pattern, cause, re.IGNORECASE)), "")
