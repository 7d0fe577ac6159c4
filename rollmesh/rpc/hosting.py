"""Runs a member whose only work is answering: starts and ends its server, membership and tasks in the right order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from rollmesh.aio.supervisor import Supervisor
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.membership import Membership
from rollmesh.rpc.server import Server
from rollmesh.types import Role, RunState

_logger = logging.getLogger(__name__)


async def serve_until_over(
    server: Server,
    work: Callable[[], Coroutine[Any, Any, None]],
    *,
    coordinator_address: str,
    run_id: str,
    role: Role,
    name: str,
    stop: asyncio.Event,
) -> int:
    """Serve, as a member, until the run is over or ``stop`` is set.

    Args:
        server: the member's server, not yet entered.
        work: makes the coroutine that does the servicers' work. The coroutine must not end before it is cancelled.
        coordinator_address: the coordinator's "host:port".
        run_id: the run's name.
        role: the member's role.
        name: the member's name.
        stop: the first signal sets this event (`rollmesh.aio.service`).

    Returns:
        The exit code: 1 if the run has failed, else 0.

    Raises:
        RollMeshError: the server cannot start, the coordinator cannot be reached or was lost.
        Exception: the error of ``work``; the coordinator knows the failure.
    """
    async with (
        server,
        CoordinatorClient(coordinator_address, name) as client,
        Membership(client, run_id, role, server.address) as membership,
        Supervisor() as supervisor,
    ):
        supervisor.spawn(work(), f"work of {name}")
        _logger.info("%s serves at %s", name, server.address)
        over = supervisor.spawn(membership.wait_over(), "end of the run", may_end=True)
        stopped = supervisor.spawn(stop.wait(), "stop", may_end=True)
        await asyncio.wait({over, stopped}, return_when=asyncio.FIRST_COMPLETED)
        await server.set_serving(False)
        if membership.run_state is RunState.FAILED:
            _logger.error("the run has failed: %s", membership.failure)
            return 1
        return 0
