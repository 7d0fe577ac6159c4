"""Composes a rollout worker and its engine: takes each section of the mesh file to the class that uses the section."""

from __future__ import annotations

from rollmesh.config import DataSection, EvaluationSection, ModelSection, SamplingSection
from rollmesh.data.render import PromptRenderer, Tokenizer
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.scorer_clients import ReferenceClient, RewardClient
from rollmesh.types import LeaseKind
from services.config import MeshConfig
from services.rollout.engine_args import EngineSettings, engine_seed
from services.rollout.worker import Worker, WorkerClients, WorkerSettings


def engine_settings(config: MeshConfig, worker_index: int = 0) -> EngineSettings:
    """Return the settings of one worker's engine; ``worker_index`` counts the run's workers from 0."""
    return EngineSettings(config.model, config.rollout, config.weights, engine_seed(config.run.seed, worker_index))


def make_worker(config: MeshConfig, name: str, tokenizer: Tokenizer) -> Worker:
    """Return a worker with its clients. The worker belongs to the running event loop.

    Args:
        config: the mesh file.
        name: the member's name, e.g. "rollout-0".
        tokenizer: the policy's tokenizer.

    Raises:
        ConfigError: an address or a template cannot be used, or the mesh file names no Redis.
    """
    settings = worker_settings(config)
    renderers = make_renderers(tokenizer, config.model, config.sampling, config.data, config.evaluation)
    reference = None
    if config.has_reference:
        assert config.reference is not None, "the configuration was checked"
        reference = ReferenceClient(config.reference.address)
    coordinator = CoordinatorClient(config.coordinator.address, name)
    clients = WorkerClients(coordinator, RewardClient(config.reward.address), reference)
    return Worker(settings, clients, renderers, tokenizer)


def worker_settings(config: MeshConfig) -> WorkerSettings:
    """Return the settings of the run's workers.

    Raises:
        ConfigError: the mesh file names no Redis.
    """
    return WorkerSettings(
        run_id=config.run.name,
        rollout=config.rollout,
        samples_per_prompt=config.training.samples_per_prompt,
        filter=config.algorithm.filter,
        redis_url=config.replay.require_url(),
        redis_timeout_s=config.replay.timeout_s,
        payload_limit_bytes=config.replay.payload_limit_bytes,
        max_attempts=config.coordinator.max_attempts,
        lease_ttl_s=config.coordinator.lease_ttl_s,
        stall_timeout_s=config.coordinator.stall_timeout_s,
        member_timeout_s=config.coordinator.member_timeout_s,
    )


def make_renderers(
    tokenizer: Tokenizer,
    model: ModelSection,
    sampling: SamplingSection,
    data: DataSection,
    evaluation: EvaluationSection | None,
) -> dict[LeaseKind, PromptRenderer]:
    """Return a renderer for each kind of lease that the run has.

    A prompt may fill ``max_length`` but for the tokens that a sample may generate.

    Raises:
        ConfigError: a template cannot be used.
    """
    max_length, new_tokens = model.max_length, sampling.max_new_tokens
    renderers = {LeaseKind.TRAIN: PromptRenderer(tokenizer, data, max_length - new_tokens)}
    if evaluation is not None:
        limit = max_length - (evaluation.max_new_tokens or new_tokens)
        renderers[LeaseKind.EVALUATE] = PromptRenderer(tokenizer, evaluation.data, limit, "evaluation.data")
    return renderers
