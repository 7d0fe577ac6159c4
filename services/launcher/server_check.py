"""Whether somebody listens at the address of a server that is not ours to start."""

from __future__ import annotations

import socket

from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import parse_address

_CONNECT_TIMEOUT_S = 5.0


def check_answers(place: str, address: str) -> None:
    """Connect and hang up.

    Raises:
        ConfigError: nobody answers within a few seconds.
    """
    target = parse_address(address, place)
    try:
        socket.create_connection((target.host, target.port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        problem = error.strerror or str(error)
        raise ConfigError(
            place, f"no server answers at {address} ({problem.lower()})", "start it first, or correct the address"
        ) from error
