"""What can be found wrong before anything heavy is imported."""

from __future__ import annotations

import json

from rollmesh.errors import ConfigError
from services.config import MeshConfig

_CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def check_start(config: MeshConfig) -> None:
    """Refuse a configuration with which the learner cannot start.

    Raises:
        ConfigError: the model folder is missing or holds no causal language model, CUDA is asked for and absent, or
            no Redis is named.
    """
    if config.replay.url is None:
        raise ConfigError("replay.url", "is not set", "start the mesh with `rollmesh up`, or name a Redis")
    check_model_folder(config)
    critic = config.learner.critic.model_path
    if config.algorithm.needs_critic and critic is not None and not (critic / "config.json").is_file():
        raise ConfigError(
            "learner.critic.model_path",
            f"{str(critic)!r} holds no config.json",
            "name the folder of a reward model or a causal language model, or remove it",
        )
    if config.learner.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("learner.device", "is 'cuda' but there is no CUDA device here", "use 'auto' or 'cpu'")


def check_model_folder(config: MeshConfig) -> None:
    """Refuse a model that the learner cannot train, from its config.json alone.

    Raises:
        ConfigError: no such folder, no readable config.json, or an architecture without a language model head.
    """
    folder = config.model.path
    fix = "name a folder with a Hugging Face causal language model"
    if not folder.is_dir():
        raise ConfigError("model.path", f"{str(folder)!r} is not a folder", fix)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", f"{str(folder)!r} has no readable config.json ({error})", fix) from error
    architectures = settings.get("architectures") or []
    if architectures and not any(name.endswith(_CAUSAL_LM_SUFFIXES) for name in architectures):
        raise ConfigError("model.path", f"{str(folder)!r} holds a {', '.join(architectures)}", fix)
    if not architectures and "model_type" not in settings:
        raise ConfigError("model.path", f"{str(folder / 'config.json')!r} names no architecture", fix)
