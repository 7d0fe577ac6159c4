"""Check that a server answers that the launcher does not start."""

from __future__ import annotations

import socket

from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import parse_address

_CONNECT_TIMEOUT_S = 5.0


def check_answers(place: str, address: str) -> None:
    """Connect to ``address``, and close the connection.

    Args:
        place: the setting that names the address, for messages.
        address: the address as "host:port".

    Raises:
        ConfigError: no server answers within 5 s.
    """
    target = parse_address(address, place)
    try:
        socket.create_connection((target.host, target.port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        problem = error.strerror or str(error)
        raise ConfigError(
            place, f"no server answers at {address} ({problem.lower()})", "start it first, or correct the address"
        ) from error
