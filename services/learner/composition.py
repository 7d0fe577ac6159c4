"""The composition of the learner: each part is built with the sections of the configuration that the part uses."""

from __future__ import annotations

import hashlib

from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.staleness import StalenessWindow
from services.config import MeshConfig, dump_mesh
from services.learner.checkpoint import CheckpointStore, Learnables
from services.learner.control import Control
from services.learner.critic import CriticEngine, load_critic
from services.learner.ema import PolicyAverage
from services.learner.engine import PolicyEngine
from services.learner.intake import Intake
from services.learner.loop import Loop, LoopResources
from services.learner.parity import ParityCheck
from services.learner.publisher import Publisher
from services.learner.ranks import Ranks
from services.learner.recorder import BatchRecorder, learner_settings
from services.learner.start import Start
from services.learner.trainer import Trainer


def load_learnables(config: MeshConfig, ranks: Ranks) -> Learnables:
    """Load the policy, and the critic and the average if the configuration has them. Collective.

    Raises:
        ConfigError: a model cannot be loaded or trained as configured.
    """
    policy, beta = load_policy(config, ranks), config.learner.ema_beta
    critic = load_critic_engine(config, ranks) if config.algorithm.needs_critic else None
    return Learnables(policy, critic, PolicyAverage(policy, ranks, beta) if beta is not None else None)


def load_policy(config: MeshConfig, ranks: Ranks) -> PolicyEngine:
    """Load the policy for training. Collective.

    Raises:
        ConfigError: the model cannot be loaded or trained as configured.
    """
    return PolicyEngine(
        config.learner,
        config.model,
        ranks,
        seed=config.run.seed,
        temperature=config.sampling.temperature,
        balances_experts=config.algorithm.aux_loss_coef > 0,
    )


def load_critic_engine(config: MeshConfig, ranks: Ranks) -> CriticEngine:
    """Load the critic for training. Collective.

    Raises:
        ConfigError: the folder holds no model that a critic can start from.
    """
    model = load_critic(config.learner, config.model, config.run.seed, ranks.device)
    return CriticEngine(model, config.learner, config.algorithm.value_clip, ranks)


def build_checkpoint_store(config: MeshConfig, ranks: Ranks) -> CheckpointStore:
    """Open the checkpoints in the run folder. Collective."""
    config_hash = hashlib.sha256(dump_mesh(config).encode()).hexdigest()
    return CheckpointStore(config.run, config.learner, config_hash, ranks)


def build_trainer(config: MeshConfig, learnables: Learnables, ranks: Ranks, num_batches: int) -> Trainer:
    """Build the trainer of a run of ``num_batches`` batches. Collective.

    Raises:
        ConfigError: `learner.attention` names an implementation that is wrong for a model.
    """
    engine = config.rollout.engine
    parity = ParityCheck(
        config.learner,
        ranks,
        engine_dtype=engine.dtype,
        engine_arguments=engine.extra,
        is_whole_distribution=config.sampling.is_whole,
    )
    return Trainer(
        config.algorithm,
        config.learner,
        learnables,
        parity,
        ranks,
        num_batches=num_batches,
        max_staleness=config.training.max_staleness,
        max_new_tokens=config.sampling.max_new_tokens,
    )


def build_publisher(config: MeshConfig, policy: PolicyEngine, ranks: Ranks, control: Control | None) -> Publisher:
    """Build the publisher. ``control`` is None on ranks other than 0."""
    return Publisher(
        config.weights,
        policy,
        ranks,
        control,
        max_staleness=config.training.max_staleness,
        engines_wait_s=max(config.rollout.start_timeout_s, config.learner.batch_timeout_s),
    )


def build_intake(config: MeshConfig, queue: BatchQueue, ranks: Ranks, control: Control | None) -> Intake:
    """Build the intake of batches from the run's queue. ``control`` is None on ranks other than 0."""
    return Intake(
        queue,
        ranks,
        batch_size=config.training.prompts_per_step,
        steps_per_batch=config.learner.steps_per_batch,
        bounds=staleness_window(config),
        timeout_s=config.learner.batch_timeout_s,
        check=control.check if control is not None else lambda: None,
        is_publish_wanted=control.is_publish_wanted if control is not None else lambda: False,
    )


def build_recorder(config: MeshConfig, ranks: Ranks, num_batches: int) -> BatchRecorder | None:
    """Build the recorder of a run of ``num_batches`` batches; None where this rank records no batches."""
    if not (config.learner.should_record_batches and ranks.is_first):
        return None
    settings = learner_settings(config)
    return BatchRecorder(config.run.folder / "batches", settings, ranks.world_size, num_batches)


def build_loop(config: MeshConfig, resources: LoopResources, start: Start) -> Loop:
    """Build the loop."""
    return Loop(
        config.learner.checkpoint,
        resources,
        start,
        staleness_bound=staleness_window(config).bound,
    )


def staleness_window(config: MeshConfig) -> StalenessWindow:
    """Return the window of the run's queue, with the staleness bound."""
    training, max_version_lag = config.training, config.coordinator.max_version_lag
    return StalenessWindow(training.max_staleness, training.num_slots, training.prompts_per_step, max_version_lag)
