"""The reward service: ``rollmesh reward``.

::

    rollout workers ──► Score streams ──► RewardServicer ──► RewardPool ──► children that run the user's reward_func

The children have loaded the file before the server opens and the service registers: a faulty file ends the start.
"""

from __future__ import annotations

import asyncio

from rollmesh.aio.service import run_service
from rollmesh.errors import ConfigError
from rollmesh.rpc.hosting import serve_until_over
from rollmesh.rpc.server import Server
from rollmesh.telemetry.logs import configure
from rollmesh.types import Role
from rollmesh.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from services.config import ScorerConfig
from services.reward.pool import RewardPool
from services.reward.servicer import RewardServicer

_GRACE_S = 2.0
"""Time in which workers that end with the run take their last answers."""


def main(config: ScorerConfig, name: str) -> int:
    """Serve until the run is over or a signal comes. Return the exit code."""
    configure(config.run.name, name)
    return run_service(lambda stop: serve(config, name, stop), name)


async def serve(config: ScorerConfig, name: str, stop: asyncio.Event) -> int:
    """Start the children, and serve until the run is over or ``stop`` is set. Return the exit code.

    Raises:
        ConfigError: the file or an address cannot be used.
    """
    section = config.reward
    if section.function is None:
        raise ConfigError("reward.function", "is not set, so there is nothing to serve", "name a Python file")
    pool = RewardPool(
        section.function,
        num_processes=section.num_processes,
        samples_per_call=section.samples_per_call,
        timeout_s=section.timeout_s,
        start_timeout_s=section.start_timeout_s,
    )
    await pool.start()
    try:
        services = {"rollmesh.v1.RewardService": (add_RewardServiceServicer_to_server, RewardServicer(pool))}
        return await serve_until_over(
            Server(section.address, services, place="reward.address", grace_s=_GRACE_S),
            pool.run,
            coordinator_address=config.coordinator.address,
            run_id=config.run.name,
            role=Role.REWARD,
            name=name,
            stop=stop,
        )
    finally:
        await pool.close()
