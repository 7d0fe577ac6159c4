"""Check the addresses that this machine will listen on: each is well-formed, local and free, and no two are equal."""

from __future__ import annotations

import contextlib
import random
import socket

from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import Address, parse_address
from rollmesh.rpc.server import explain_bind_error
from services.config import MeshConfig

_PORTS = (15000, 32000)
"""The first and the last port that `reserve_any` tries.

They lie above the ports of well-known servers, and below the ports that Linux gives to connections.
"""
_TRIES = 20


def check_addresses(config: MeshConfig) -> None:
    """Check every address that a service of `rollmesh up` binds.

    Raises:
        ConfigError: an address cannot be used.
    """
    places = {"coordinator.address": config.coordinator.address, "learner.address": config.learner.address}
    if config.reward.function:
        places["reward.address"] = config.reward.address
    if config.has_reference and config.reference:
        places["reference.address"] = config.reference.address
    places["rollout.address"] = config.rollout.address
    addresses = {place: parse_address(text, place) for place, text in places.items()}
    if config.rollout.num_workers > 1 and addresses["rollout.address"].port:
        raise ConfigError(
            "rollout.address",
            f"{config.rollout.address} is one port for rollout.num_workers = {config.rollout.num_workers} workers",
            f"write {Address(addresses['rollout.address'].host, 0)}, and each takes a free one",
        )
    _check_weights_host(config.weights.host)
    addresses["weights.store_port"] = Address(config.weights.host, config.weights.store_port)
    seen: dict[Address, str] = {}
    for place, address in addresses.items():
        if address.port and address in seen:
            raise ConfigError(place, f"{address} is also {seen[address]}", "use another port")
        seen[address] = place
        reserve(place, address).close()


def _check_weights_host(host: str) -> None:
    """Check that this machine can listen on ``host``. Engines connect to this host: 0.0.0.0 would not work."""
    try:
        reserve("weights.host", Address(host, 0)).close()
    except ConfigError as error:
        fix = "use the address at which the engines reach this machine, e.g. 127.0.0.1"
        raise ConfigError(error.place, error.problem, fix) from error


def reserve(place: str, address: Address) -> socket.socket:
    """Return a socket that listens at ``address``; port 0 takes a free port. The caller closes the socket.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        problem = f"{address.host!r} is an unknown host ({error.strerror})"
        raise ConfigError(place, problem, "use a host name that resolves, or an IP address") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen()
    except OSError as error:
        listener.close()
        problem, fix = explain_bind_error(error)
        shown = address if address.port else address.host
        raise ConfigError(place, f"{shown} {problem}", fix) from error
    return listener


def reserve_any(place: str, host: str) -> socket.socket:
    """Return a socket that listens at a free port of ``host``. The caller closes the socket.

    The port lies outside the range that the system gives to connections. So no connection takes the port after the
    socket is closed. Where several tries find no such port, the system chooses the port.

    Raises:
        ConfigError: the host has no free port.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(ConfigError):
            return reserve(place, Address(host, random.randint(*_PORTS)))
    return reserve(place, Address(host, 0))
