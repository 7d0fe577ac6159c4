"""Parses addresses, and opens channels. All channels of the mesh are opened here.

Both ends use the limits and the frame size of this module. With unequal limits, a message that one side may send breaks
the whole stream of the other side.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from rollmesh.errors import ConfigError
from rollmesh.wire.limits import MAX_MESSAGE_BYTES

_MAX_FRAME_BYTES = 16 * 1024 * 1024 - 1
"""The largest possible HTTP/2 frame. The default of 16 KiB halves the throughput of large messages."""

COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", _MAX_FRAME_BYTES),
)

_CONNECT_TIMEOUT_MS = 5_000

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, this option bounds the time of one try to connect. The other two options say when the next try
    # follows.
    ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy in the environment is for the way to the internet. The mesh's own traffic never uses the proxy.
    ("grpc.enable_http_proxy", 0),
)

_RESOLVED_BY_GRPC = re.compile(r"^(dns|ipv4|ipv6|xds):")


@dataclass(frozen=True, slots=True)
class Address:
    """A host (a name or an IP address, without brackets) and a port. Port 0 asks for a free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, place: str = "address") -> Address:
    """Parse "host:port"; an IPv6 host stands in brackets.

    Args:
        text: the address as the user wrote it.
        place: the dotted configuration path of the address, for errors.

    Raises:
        ConfigError: ``text`` is not an address.
    """
    match = re.fullmatch(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/\[\]]+)):(?P<port>[0-9]{1,5})", text)
    if match is None:
        raise ConfigError(place, f"{text!r} is not an address", "write it as host:port, e.g. 127.0.0.1:50051")
    port = int(match["port"])
    if port > 65535:
        raise ConfigError(place, f"{text!r} has a port above 65535", "use a port of 1 to 65535, or 0 for a free one")
    if match["ipv6"] is not None:
        try:
            ipaddress.IPv6Address(match["ipv6"])
        except ValueError as error:
            raise ConfigError(place, f"{text!r} is not an IPv6 address", "correct it, e.g. [::1]:50051") from error
    return Address(match["ipv6"] or match["name"], port)


def check_callable(address: str, place: str = "address") -> None:
    """Check that an address names a server: "host:port", or a target that gRPC resolves itself.

    Raises:
        ConfigError: the address is malformed, or its port is 0.
    """
    if not _RESOLVED_BY_GRPC.match(address) and parse_address(address, place).port == 0:
        raise ConfigError(place, f"{address!r} has port 0, which nobody can call", "name the server's port")


def open_channel(address: str, place: str = "address") -> grpc.aio.Channel:
    """Return a channel to a server of the mesh. The channel belongs to the running event loop, and connects when used.

    Args:
        address: "host:port", or a target that gRPC resolves itself, such as "dns:///rewards.example:50051".
        place: the configuration path of the address, for errors.

    Raises:
        ConfigError: the address is malformed, or its port is 0.
    """
    check_callable(address, place)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


class Connection:
    """A channel to one peer. Belongs to the running event loop; `close` it when done.

    Args:
        peer: the name of the peer, for errors.
        address: the peer's "host:port".
        place: the configuration path of the address, for errors.

    Raises:
        ConfigError: the address is malformed.
    """

    def __init__(self, peer: str, address: str, place: str) -> None:
        self.peer = peer
        self._channel = open_channel(address, place)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Closing cancels the calls that are under way."""
        await self._channel.close()
