"""What can be found wrong before anything heavy is imported."""

from __future__ import annotations

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError
from services.config import MeshConfig


def check_start(config: MeshConfig) -> None:
    """Refuse a configuration with which the learner cannot start.

    Raises:
        ConfigError: the model folder is missing or holds no causal language model, the critic's folder is none, CUDA
            is asked for and absent, or no Redis is named.
    """
    if config.replay.url is None:
        raise ConfigError("replay.url", "is not set", "start the mesh with `rollmesh up`, or name a Redis")
    ModelFolder.read("model.path", config.model.path).check_trainable()
    critic = config.learner.critic.model_path
    if config.algorithm.needs_critic and critic is not None:
        ModelFolder.read("learner.critic.model_path", critic)
    if config.learner.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("learner.device", "is 'cuda' but there is no CUDA device here", "use 'auto' or 'cpu'")
