"""Load models from local folders. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rollmesh.errors import ConfigError
from rollmesh.models.attention import choose_attention


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model folder and the options for loading its model.

    Attributes:
        path: the folder.
        dtype: the parameters' dtype: "float32", "bfloat16", "float16", or "auto" for the dtype of the checkpoint.
        attention: transformers' attn_implementation, or "auto".
        device: the device that the model will compute on; loading puts the model into main memory.
        trust_remote_code: whether Python code in the folder may run.
        place: the configuration path that named the folder, for errors.
        attention_place: the configuration path that named the attention.
    """

    path: Path
    dtype: str
    attention: str
    device: torch.device
    trust_remote_code: bool
    place: str
    attention_place: str


def load_causal_lm(source: ModelSource) -> Any:
    """Load a causal language model; see `load_pretrained`.

    Raises:
        ConfigError: the model cannot be loaded, or it names no output layer, which `WantedLogits` needs.
    """
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, source)
    if model.get_output_embeddings() is None:
        problem = f"{type(model).__name__} in {source.path} gives no output embeddings"
        raise ConfigError(source.place, problem, "name another architecture, or let get_output_embeddings return them")
    return model


def load_pretrained(auto_class: Any, source: ModelSource) -> Any:
    """Load a model with every dropout and the routers' noise off.

    With dropout or noise, the policy in training would differ from the policy that generated the samples.

    Args:
        auto_class: an auto class of transformers.
        source: the folder and the options.

    Raises:
        ConfigError: the model cannot be loaded, or the folder lacks some of the model's weights.
    """
    from transformers import AutoConfig

    options = {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.path, **options)
        turn_randomness_off(config)
        attention = choose_attention(config, source.attention, source.dtype, source.device, source.attention_place)
        model, info = auto_class.from_pretrained(
            source.path,
            config=config,
            dtype="auto" if source.dtype == "auto" else getattr(torch, source.dtype),
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        problem = f"the model in {source.path} cannot be loaded ({describe(error)})"
        raise ConfigError(source.place, problem, "name a complete Hugging Face model folder") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers
        problem = f"{source.path} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]})"
        raise ConfigError(source.place, problem, "name a folder with all of them")
    return model


def turn_randomness_off(config: Any) -> None:
    """Set every dropout and the routers' noise in a configuration to 0."""
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith(("_pdrop", "_jitter_noise"))):
            setattr(config, name, 0.0)


def describe(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no details'}"
