"""The reference service: ``rollmesh reference``.

::

    rollout workers ──► ComputeLogProbs streams ──► ReferenceServicer ──► Scheduler ──► FrozenPolicy, in its own thread

The model is loaded before the server opens and the service registers.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch

from rollmesh.aio.service import run_service
from rollmesh.config import ModelSection
from rollmesh.errors import ConfigError
from rollmesh.rpc.channel import check_callable
from rollmesh.rpc.hosting import serve_until_over
from rollmesh.rpc.server import Server
from rollmesh.telemetry.logs import configure
from rollmesh.types import Role
from rollmesh.v1.reference_pb2_grpc import add_ReferenceServiceServicer_to_server
from services.config import ScorerConfig
from services.reference.config import ReferenceSection
from services.reference.model import FrozenPolicy
from services.reference.scheduler import Scheduler
from services.reference.servicer import ReferenceServicer

_GRACE_S = 2.0
"""Time in which workers that end with the run take their last answers."""
_WAITING_BATCHES = 8
"""The number of batches whose tokens may wait. With more waiting tokens the servicer reads no further."""


def main(config: ScorerConfig, name: str) -> int:
    """Serve until the run is over or a signal comes. Return the exit code."""
    configure(config.run.name, name)
    return run_service(lambda stop: serve(config, name, stop), name)


async def serve(config: ScorerConfig, name: str, stop: asyncio.Event) -> int:
    """Load the model, and serve until the run is over or ``stop`` is set. Return the exit code.

    Raises:
        ConfigError: the model, the device or an address cannot be used.
    """
    section = config.reference
    if section is None:
        raise ConfigError("reference", "is not configured, so there is nothing to serve", "add a `reference:` section")
    check_callable(config.coordinator.address, "coordinator.address")  # before the model is loaded
    # torch sets the number of threads for the calling thread, so the thread that computes has to set the number.
    executor = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(section.num_threads,))
    try:
        policy = await asyncio.get_running_loop().run_in_executor(executor, _load, section, config.model)
        scheduler = Scheduler(
            policy.compute_logprobs, executor, section.tokens_per_batch, _WAITING_BATCHES * section.tokens_per_batch
        )
        max_num_tokens = min(section.tokens_per_batch, policy.max_length or section.tokens_per_batch)
        servicer = ReferenceServicer(scheduler, policy.vocab_size, max_num_tokens)
        services = {"rollmesh.v1.ReferenceService": (add_ReferenceServiceServicer_to_server, servicer)}
        return await serve_until_over(
            Server(section.address, services, place="reference.address", grace_s=_GRACE_S),
            scheduler.run,
            coordinator_address=config.coordinator.address,
            run_id=config.run.name,
            role=Role.REFERENCE,
            name=name,
            stop=stop,
        )
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _load(section: ReferenceSection, model: ModelSection | None) -> FrozenPolicy:
    assert model is not None, "the configuration was checked"
    return FrozenPolicy.load(
        section.model_path or model.path,
        dtype=section.dtype,
        device=section.device,
        place="reference.model_path" if section.model_path else "model.path",
        attention=section.attention,
        trust_remote_code=model.trust_remote_code,
    )
