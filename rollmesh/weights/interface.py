"""The choice of the network interface that carries weights, so that no library listens on another. Torch-free.

`weights.host` names the learner's address. On the learner's machine, the interface with this address is chosen. On
every other machine, the interface from which this address is reached is chosen.
"""

from __future__ import annotations

import os
import socket

import psutil

from rollmesh.errors import ConfigError

_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""Variables that Gloo and NCCL read when they make a process group. Unset, both libraries choose an interface
themselves. The sign ``=`` makes NCCL take exactly this name, and not every interface whose name begins with it."""


def address_towards(host: str) -> str:
    """Return this machine's address from which ``host`` is reached; peers on that host can reach this address.

    Raises:
        ConfigError: the host is unknown, or no route leads to it.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing, only picks the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            "weights.host", f"no route leads to {host!r} ({error})", "name an address of the learner that is reached"
        ) from error


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has ``address``; None where no interface has this address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def keep_to_interface(host: str) -> None:
    """Make Gloo and NCCL of this process and its children listen only on the interface towards ``host``.

    Call this before the first process group is made. A variable that the user has set stays.

    Raises:
        ConfigError: no route leads to the host.
    """
    name = interface_of(address_towards(host))
    if name is not None:
        for variable, form in _VARIABLES.items():
            os.environ.setdefault(variable, form.format(name))
