"""How much memory Redis may use, and when the coordinator has to wait for memory before it opens groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT_FRACTION = 0.85
"""From this part of the limit on nothing new is opened, so that groups that are open can still be committed."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class RedisMemory:
    """What a server uses of what it may use.

    Attributes:
        used_bytes: by everything that the server holds, other runs and other users included.
        limit_bytes: its `maxmemory`; 0 where it has none.
    """

    used_bytes: int
    limit_bytes: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> RedisMemory:
        """From the answer to ``INFO memory``."""
        return cls(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))

    @property
    def is_short(self) -> bool:
        """Whether nothing new is to be opened."""
        return self.limit_bytes > 0 and self.used_bytes >= SHORT_FRACTION * self.limit_bytes

    def __str__(self) -> str:
        return f"{self.used_bytes / _MIB:,.0f} of {self.limit_bytes / _MIB:,.0f} MiB"


def default_limit_bytes() -> int:
    """Half of the memory that this process may use: of the machine's, or of its control group's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        group = machine
    return min(machine, group) // 2
