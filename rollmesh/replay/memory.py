"""How much memory Redis may use, and when the coordinator has to wait for memory before it opens groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT_FRACTION = 0.85
"""If this part of the limit is in use, no group is opened, so that open groups can still be committed."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class RedisMemory:
    """The memory that a server uses, and its limit.

    Attributes:
        used_bytes: memory in use, including that of other runs and other users.
        limit_bytes: the server's `maxmemory`; 0 where the server has no limit.
    """

    used_bytes: int
    limit_bytes: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> RedisMemory:
        """Return the memory that an answer to ``INFO memory`` reports."""
        return cls(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))

    @property
    def is_short(self) -> bool:
        """Whether memory is too short to open another group."""
        return self.limit_bytes > 0 and self.used_bytes >= SHORT_FRACTION * self.limit_bytes

    def __str__(self) -> str:
        return f"{self.used_bytes / _MIB:,.0f} of {self.limit_bytes / _MIB:,.0f} MiB"


def default_limit_bytes() -> int:
    """Return half of the machine's memory, or half of the control group's limit where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):  # the file is missing, or contains "max"
        group = machine
    return min(machine, group) // 2
