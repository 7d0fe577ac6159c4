"""The checks of the learner's configuration before torch, transformers and DeepSpeed are imported."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rollmesh.config.shared import ModelSection
from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError
from services.learner.config import LearnerSection


def check_start(section: LearnerSection, policy: ModelSection, needs_critic: bool) -> None:
    """Refuse a configuration with which the learner cannot start.

    Args:
        section: the learner's settings.
        policy: the settings of the policy model, with its folder.
        needs_critic: whether the algorithm trains a critic.

    Raises:
        ConfigError: the policy's folder is missing or holds no causal language model, the critic's folder holds no
            model, the device is "cuda" on a machine without CUDA, or the environment names other ranks.
    """
    check_ranks(section.num_ranks, os.environ)
    ModelFolder.read("model.path", policy.path).check_trainable()
    critic = section.critic.model_path
    if needs_critic and critic is not None:
        ModelFolder.read("learner.critic.model_path", critic)
    if section.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("learner.device", "is 'cuda' but there is no CUDA device here", "use 'auto' or 'cpu'")


def check_ranks(num_ranks: int, environment: Mapping[str, str]) -> None:
    """Refuse values of RANK and WORLD_SIZE that do not fit the learner's number of ranks.

    A job around the mesh may have set both variables for its own processes. The learner would then wait for ranks that
    no process starts. Without RANK, a learner of several ranks starts its ranks itself and sets both variables.

    Raises:
        ConfigError: RANK or WORLD_SIZE contradicts ``num_ranks``, or is not a number.
    """
    rank, world_size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None and (world_size is None or num_ranks > 1):
        return
    fix = f"unset RANK, WORLD_SIZE and MASTER_ADDR here, or start {num_ranks} processes with RANK from 0"
    if world_size != str(num_ranks):
        problem = f"{num_ranks} differs from WORLD_SIZE {world_size!r} of the environment"
        raise ConfigError("learner.num_ranks", problem, fix)
    if rank is not None and not (rank.isdecimal() and int(rank) < num_ranks):
        problem = f"{num_ranks} has no rank {rank!r}, which RANK of the environment names"
        raise ConfigError("learner.num_ranks", problem, fix)
