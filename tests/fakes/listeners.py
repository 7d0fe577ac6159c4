"""The addresses on which the processes of a tree listen, read from Linux's /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    """A TCP socket that takes connections."""

    address: str
    port: int
    command: str
    """The command line of the process that holds the socket."""

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine can connect."""
        return ipaddress.ip_address(self.address).is_loopback


def process_tree(root: int) -> set[int]:
    """Return the ids of the process ``root`` and of all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, left = set(), [root]
    while left:
        found.add(left[-1])
        left.extend(children.get(left.pop(), []))
    return found


def listeners(processes: Iterable[int]) -> list[Listener]:
    """Return the listening sockets of the processes, sorted by address and port."""
    addresses = dict(_listening())
    found = set()
    for process in processes:
        folder = Path(f"/proc/{process}")
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inode = os.readlink(descriptor)
                    if inode in addresses:
                        found.add(Listener(*addresses[inode], command))
    return sorted(found, key=lambda listener: (listener.address, listener.port))


def _listening() -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield each listening socket: the link target of its descriptors in /proc, and its address and port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a machine without IPv6
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    address, _, port = fields[1].partition(":")
                    yield f"socket:[{fields[9]}]", (_decode(address), int(port, 16))


def _decode(digits: str) -> str:
    """Return the address that the kernel writes as 32-bit words in the machine's own order of bytes.

    "0100007F" gives 127.0.0.1.
    """
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
