"""Check the models of a mesh file: each model folder by itself, then against the settings of the mesh file."""

from __future__ import annotations

import re
from pathlib import Path

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_LAYER = re.compile(r"^(?:model\.|transformer\.|gpt_neox\.|language_model\.)*(?:layers|h)\.(\d+)\.")


def check_model(place: str, path: Path, *, trust_remote_code: bool = False, is_trained: bool = False) -> ModelFolder:
    """Return a model folder; refuse a folder that is not a complete causal language model with its tokenizer.

    Args:
        place: the setting that names the folder, for messages.
        path: the folder.
        trust_remote_code: whether Python code in the folder may run.
        is_trained: whether the run trains this model.

    Raises:
        ConfigError: a file is missing or damaged, or contradicts config.json.
    """
    folder = ModelFolder.read(place, path)
    folder.check_causal_lm()
    if is_trained:
        folder.check_trainable()
    folder.check_known(trust_remote_code)
    _check_shapes(folder)
    folder.check_tokenizer()
    return folder


def check_length(model: ModelFolder, max_length: int) -> None:
    """Raise ConfigError if the model has fewer positions than model.max_length."""
    if model.max_positions is not None and max_length > model.max_positions:
        raise ConfigError(
            "model.max_length",
            f"{max_length} is more than the {model.max_positions} positions of the model",
            f"use {model.max_positions} at most",
        )


def check_reference(policy: ModelFolder, reference: ModelFolder) -> None:
    """Raise ConfigError if the reference does not know all tokens of the policy."""
    if policy.vocab_size is not None and reference.vocab_size is not None and reference.vocab_size < policy.vocab_size:
        raise ConfigError(
            "reference.model_path",
            f"knows {reference.vocab_size} tokens, but the policy samples from {policy.vocab_size}",
            "name a model with the policy's tokenizer",
        )


def _check_shapes(folder: ModelFolder) -> None:
    """Check the shape of the embeddings and the number of layers against config.json.

    For every architecture config.json tells these two, and no others.

    Raises:
        ConfigError: the weights differ from config.json.
    """
    vocab_size, hidden_size = folder.vocab_size, folder.integer("hidden_size", "n_embd")
    problem = f"the weights in {folder.path} do not match its config.json: "
    for name, shape in folder.shapes.items():
        is_told = _EMBEDDING.search(name) and vocab_size is not None and hidden_size is not None and len(shape) == 2
        if is_told and shape != (vocab_size, hidden_size):
            problem += (
                f"{name} is {shape[0]} × {shape[1]}, but vocab_size × hidden_size is {vocab_size} × {hidden_size}"
            )
            raise ConfigError(folder.place, problem, "bring the two together from one export")
    wanted = folder.integer("num_hidden_layers", "n_layer")
    found = {int(match[1]) for name in folder.shapes if (match := _LAYER.match(name))}
    is_text_only = "vision_config" not in folder.settings
    if is_text_only and wanted is not None and found and len(found) < wanted:
        problem += f"{len(found)} layers, but num_hidden_layers is {wanted}"
        raise ConfigError(folder.place, problem, "bring the two together from one export")
