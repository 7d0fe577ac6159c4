"""Runs a gRPC server: bind, health, reflection, status mapping, ordered stop. All servers of the mesh run here.

::

    async with Server("127.0.0.1:0", {"rollmesh.v1.RewardService": (add_RewardServiceServicer_to_server, servicer)},
                      place="reward.address") as server:
        ... server.address ...
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import COMMON_OPTIONS, Address, parse_address
from rollmesh.rpc.interceptor import ErrorInterceptor

_logger = logging.getLogger(__name__)

# Without SO_REUSEPORT, a port in use is an error. With SO_REUSEPORT, two servers would share the callers of one port.
_SERVER_OPTIONS = (*COMMON_OPTIONS, ("grpc.so_reuseport", 0))

Service = tuple[Callable[[Any, Any], None], Any]
"""The generated ``add_<Service>Servicer_to_server`` and the servicer, whose methods are coroutines or asynchronous
generators."""


class Server:
    """A gRPC server that lives as long as its ``async with`` block.

    Leaving the block reports NOT_SERVING, refuses new calls, gives the running calls ``grace_s`` to end, and cancels
    the calls that have not ended. A servicer should end its long streams before.

    Args:
        address: "host:port"; port 0 takes a free port.
        services: the services by full name, e.g. "rollmesh.v1.RewardService".
        place: the configuration path of the address, for errors.
        grace_s: time that running calls have to end.
        is_serving: whether the health service reports SERVING at first.

    Raises:
        ConfigError: on construction, the address is malformed; on entering, the address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        services: Mapping[str, Service],
        *,
        place: str = "address",
        grace_s: float = 5.0,
        is_serving: bool = True,
    ) -> None:
        self._wanted = parse_address(address, place)
        self._services = dict(services)
        self._place = place
        self._grace_s = grace_s
        self._is_serving = is_serving
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._bound: Address | None = None

    @property
    def address(self) -> str:
        """The "host:port" that the server listens on."""
        assert self._bound is not None, "the server has not been started"
        return str(self._bound)

    async def set_serving(self, is_serving: bool) -> None:
        """Report through the health service whether this server wants calls. The server answers calls in both cases."""
        self._is_serving = is_serving
        status = health_pb2.HealthCheckResponse
        for name in ("", *self._services):
            await self._health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def __aenter__(self) -> Self:
        # The server belongs to the running event loop, so the constructor cannot make the server.
        server = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=_SERVER_OPTIONS)
        for add_to_server, servicer in self._services.values():
            add_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self._bound = self._bind(server)
        await self.set_serving(self._is_serving)
        await server.start()
        self._server = server
        if not self._bound.is_loopback:
            _logger.warning("%s is reachable from other machines without TLS or authentication", self._bound)
        return self

    def _bind(self, server: grpc.aio.Server) -> Address:
        try:
            port = server.add_insecure_port(str(self._wanted))
        except RuntimeError as error:
            problem, fix = _why_not(self._wanted)
            raise ConfigError(self._place, f"{str(self._wanted)!r} {problem}", fix) from error
        return Address(self._wanted.host, port)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop as if the block ended. Safe to repeat."""
        server, self._server = self._server, None
        if server is not None:
            await self._health.enter_graceful_shutdown()
            await server.stop(self._grace_s)


def _why_not(address: Address) -> tuple[str, str]:
    """Return why an address cannot be bound, and the fix. gRPC's own error gives no reason."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        return f"has an unknown host ({error.strerror})", "use a host name that resolves, or an IP address"
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
        except OSError as error:
            return explain_bind_error(error)
    return "cannot be bound", "try another port"


def explain_bind_error(error: OSError) -> tuple[str, str]:
    """Return the fault of an address that could not be bound, and the fix."""
    match error.errno:
        case errno.EADDRINUSE:
            return "is in use by another process", "choose another port, or 0 for a free one"
        case errno.EADDRNOTAVAIL:
            return "is not an address of this machine", "use one that is, or 0.0.0.0 for all of them"
        case errno.EACCES:
            return "needs privileges that this process lacks", "use a port above 1023"
    return f"cannot be bound ({error.strerror})", "correct it"
