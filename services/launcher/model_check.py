"""What a Hugging Face model folder gives away without loading it: config.json, the headers of the weights, a tokenizer.

Reads text and headers alone, so that a folder of any size takes a fraction of a second; no torch, no transformers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError

_CAUSAL_LM = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_LAYER = re.compile(r"^(?:model\.|transformer\.|gpt_neox\.|language_model\.)*(?:layers|h)\.(\d+)\.")
_EXPORT_AGAIN = "copy or export the model again"


@dataclass(frozen=True)
class ModelSummary:
    """What the folder says; None where it does not say."""

    architecture: str
    vocab_size: int | None
    max_positions: int | None


def check_model(place: str, path: Path, *, trust_remote_code: bool = False) -> ModelSummary:
    """Refuse what is not a complete folder of a causal language model with its tokenizer.

    Args:
        place: the configuration path that names the folder, for messages.

    Raises:
        ConfigError: something is missing, damaged, or at odds with config.json.
    """
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise ConfigError(place, f"{path} {problem}", "name a Hugging Face model folder")
    settings = _read_config(place, path)
    architecture = _check_architecture(place, path, settings, trust_remote_code)
    text = settings.get("text_config")
    text = text if isinstance(text, dict) else settings
    shapes = _read_shapes(place, path)
    _check_shapes(place, path, shapes, text, is_text_only="vision_config" not in settings)
    _check_tokenizer(place, path)
    return ModelSummary(architecture, _integer(text, "vocab_size"), _max_positions(text))


def check_length(summary: ModelSummary, max_length: int) -> None:
    """Raises ConfigError if the model has fewer positions than model.max_length."""
    if summary.max_positions is not None and max_length > summary.max_positions:
        raise ConfigError(
            "model.max_length",
            f"{max_length} is more than the {summary.max_positions} positions of the model (max_position_embeddings)",
            f"use {summary.max_positions} at most",
        )


def check_reference(policy: ModelSummary, reference: ModelSummary) -> None:
    """Raises ConfigError if the reference does not know all tokens of the policy."""
    if policy.vocab_size is not None and reference.vocab_size is not None and reference.vocab_size < policy.vocab_size:
        raise ConfigError(
            "reference.model_path",
            f"knows {reference.vocab_size} tokens, but the policy samples from {policy.vocab_size}",
            "name a model with the policy's tokenizer",
        )


def _read_config(place: str, path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(place, f"{path} has no config.json", "name a Hugging Face model folder") from error
    except OSError as error:
        raise ConfigError(place, f"{file} cannot be read ({error.strerror})", "make it readable") from error
    except ValueError as error:
        raise ConfigError(place, f"{file} is not JSON ({error})", _EXPORT_AGAIN) from error
    if not isinstance(settings, dict):
        raise ConfigError(place, f"{file} is not a JSON object", _EXPORT_AGAIN)
    return settings


def _check_architecture(place: str, path: Path, settings: Mapping[str, Any], trust_remote_code: bool) -> str:
    architectures = [str(name) for name in settings.get("architectures") or []]
    found = ", ".join(architectures)
    if not any(name.endswith(_CAUSAL_LM) for name in architectures):
        what = f"holds a {found}" if found else "names no architecture in config.json"
        raise ConfigError(place, f"{path} {what}", "name the folder of a causal language model")
    if settings.get("auto_map"):
        if not trust_remote_code:
            problem = f"{path} brings Python code of its own for {found}, which does not run unasked"
            raise ConfigError(place, problem, "set model.trust_remote_code to true if you trust it")
    elif not _is_known_type(str(settings.get("model_type"))):
        problem = f"{path} holds a {found} of model_type {settings.get('model_type')!r}, which transformers "
        problem += f"{importlib.metadata.version('transformers')} does not know"
        raise ConfigError(place, problem, "correct config.json or install a newer transformers")
    return found


def _is_known_type(model_type: str) -> bool:
    """Whether transformers' tables name the type; asked of their text, for the import takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return True
    tables = [file.read_text(encoding="utf-8") for file in (Path(spec.origin).parent / "models" / "auto").glob("*.py")]
    return not tables or any(f'"{model_type}"' in table for table in tables)


def _read_shapes(place: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Of each tensor in the safetensors files; empty where the weights have another format."""
    _check_shards(place, path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(path.glob("*.bin"))
        if not others:
            raise ConfigError(place, f"{path} has no weights (*.safetensors)", _EXPORT_AGAIN)
        for file in others:
            if not file.stat().st_size:
                raise ConfigError(place, f"{file} is empty", _EXPORT_AGAIN)
        return {}
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        return {}
    shapes = {}
    for file in files:
        if not file.stat().st_size:
            raise ConfigError(place, f"{file} is empty", _EXPORT_AGAIN)
        try:
            with safe_open(file, framework="numpy") as weights:
                shapes.update({name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            problem = f"{file} is damaged ({str(error).rstrip('.').lower()})"
            raise ConfigError(place, problem, _EXPORT_AGAIN) from error
    return shapes


def _check_shards(place: str, path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(place, f"{index} is not an index of weights", _EXPORT_AGAIN) from error
    missing = sorted(shard for shard in shards if not (path / shard).exists())
    if missing:
        problem = f"{path} lacks {len(missing)} of {len(shards)} weight files (first: {missing[0]})"
        raise ConfigError(place, problem, _EXPORT_AGAIN)


def _check_shapes(
    place: str, path: Path, shapes: Mapping[str, tuple[int, ...]], text: Mapping[str, Any], *, is_text_only: bool
) -> None:
    """The tensors whose shape and number config.json tells for every architecture: embeddings and layers."""
    expected = _integer(text, "vocab_size"), _integer(text, "hidden_size")
    for name, shape in shapes.items():
        if _EMBEDDING.search(name) and None not in expected and len(shape) == 2 and shape != expected:
            problem = f"the weights in {path} do not match its config.json: {name} is {shape[0]} × {shape[1]}"
            problem += f", but vocab_size × hidden_size is {expected[0]} × {expected[1]}"
            raise ConfigError(place, problem, "bring the two together from one export")
    wanted = _integer(text, "num_hidden_layers")
    found = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if is_text_only and wanted is not None and found and len(found) < wanted:
        problem = f"the weights in {path} do not match its config.json: {len(found)} layers, but num_hidden_layers is "
        raise ConfigError(place, f"{problem}{wanted}", "bring the two together from one export")


def _check_tokenizer(place: str, path: Path) -> None:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((path / name).exists() for name in files) and not any(path.glob("*.tiktoken")):
        raise ConfigError(
            place, f"{path} has no tokenizer (tokenizer.json)", "save the model's tokenizer into the same folder"
        )


def _integer(settings: Mapping[str, Any], key: str) -> int | None:
    value = settings.get(key)
    return value if isinstance(value, int) else None


def _max_positions(text: Mapping[str, Any]) -> int | None:
    """None also where positions are scaled: how far they reach is the engine's to say."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    is_scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
    return None if is_scaled else _integer(text, "max_position_embeddings")
