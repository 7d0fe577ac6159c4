"""Runs the rollout worker as a process: the cheap checks come first, then the engine starts, then the work begins."""

from __future__ import annotations

import asyncio
import logging
import re

from rollmesh.aio.service import run_service
from rollmesh.data.render import load_tokenizer
from rollmesh.replay.connection import check_server
from rollmesh.telemetry import logs
from services.config import MeshConfig
from services.rollout.compose import engine_settings, make_worker
from services.rollout.engine import Engine
from services.rollout.engine_args import EngineSettings

_logger = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 10.0
"""Time that a starting engine may take to give its start up."""


def main(config: MeshConfig, name: str) -> int:
    """Run one rollout worker to the end of the run, or until SIGTERM.

    Returns:
        The exit code: 0 where the run finished or somebody stopped the worker, 1 where the run has failed.

    Raises:
        ConfigError: the mesh file does not let the worker start.
        StartAgainError: the engine died, hangs or is tainted; the command line exits with `EXIT_START_AGAIN`.
        RollMeshError: the run, or this worker, failed.
    """
    logs.configure(config.run.name, name)
    return run_service(lambda stop: _serve(config, name, stop), name)


async def _serve(config: MeshConfig, name: str, stop: asyncio.Event) -> int:
    await asyncio.to_thread(check_server, config.replay.require_url(), config.replay.timeout_s)
    tokenizer = await asyncio.to_thread(load_tokenizer, config.model.path, config.model.trust_remote_code)
    worker = make_worker(config, name, tokenizer)
    engine = await _start_engine(engine_settings(config, worker_index(name)), stop)
    if engine is None:
        return 0
    try:
        return await worker.run(engine, stop)
    finally:
        await engine.stop()


async def _start_engine(settings: EngineSettings, stop: asyncio.Event) -> Engine | None:
    """Return the started engine; None if somebody stopped the worker before. The engine bounds its own start."""
    clock = asyncio.get_running_loop().time
    began_at = clock()
    starting = asyncio.create_task(Engine.start(settings), name="engine start")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return None
        engine = starting.result()
        _logger.info("engine started in %.1f s", clock() - began_at)
        return engine
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.wait({starting, stopping}, timeout=_CANCEL_TIMEOUT_S)


def worker_index(name: str) -> int:
    """Return the worker's position among the run's workers: 3 for "rollout-3", 0 where the name has no number.

    The position gives every worker other random numbers.
    """
    match = re.search(r"-(\d+)$", name)
    return int(match[1]) if match else 0
