"""The facts in a Hugging Face model folder that can be read without loading the model.

All code that looks into a model folder before the model is loaded uses this module. It reads config.json, the names of
files and the headers of weights. It imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rollmesh.data.weight_files import EXPORT_AGAIN, Shape, find_weights, read_shapes, second_copies
from rollmesh.errors import ConfigError

_CAUSAL_LM = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder with a readable config.json. The caller chooses the further checks.

    Attributes:
        place: the dotted path of the setting that names the folder, for messages.
        path: the folder.
        settings: the content of config.json.
    """

    place: str
    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, place: str, path: Path) -> ModelFolder:
        """Return the folder, with its config.json read.

        Raises:
            ConfigError: there is no such folder, or the folder has no readable config.json.
        """
        if not path.is_dir():
            problem = "is not a folder" if path.exists() else "does not exist"
            raise ConfigError(place, f"{path} {problem}", "name a Hugging Face model folder")
        return cls(place, path, _read_config(place, path / "config.json"))

    @property
    def architecture(self) -> str:
        """The model classes that config.json names, joined by commas; empty where config.json names no class."""
        return ", ".join(str(name) for name in self.settings.get("architectures") or [])

    @property
    def text(self) -> Mapping[str, Any]:
        """The settings of the language model; in a model for images or sound too, they are a part of config.json."""
        text = self.settings.get("text_config")
        return text if isinstance(text, dict) else self.settings

    @property
    def vocab_size(self) -> int | None:
        """The number of tokens in the vocabulary; None where config.json does not say."""
        return self.integer("vocab_size")

    @property
    def max_positions(self) -> int | None:
        """The number of positions of the model; None where config.json does not say.

        None also where the model scales positions: then the engine knows the number.
        """
        rope = self.text.get("rope_scaling") or self.text.get("rope_parameters") or {}
        is_scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
        return None if is_scaled else self.integer("max_position_embeddings", "n_positions")

    def integer(self, *keys: str) -> int | None:
        """Return the first whole number under one of the keys in the language model's settings, or None."""
        return next((self.text[key] for key in keys if isinstance(self.text.get(key), int)), None)

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The files from which the weights are read.

        Raises:
            ConfigError: a file is missing, or has a format that is not read.
        """
        return find_weights(self.place, self.path, self.settings.get("transformers_weights"))

    @property
    def second_copies(self) -> frozenset[Path]:
        """The files that belong to another layout of the weights; see `rollmesh.data.weight_files.second_copies`."""
        return second_copies(self.path, self.weights)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each tensor in the files of weights, by the tensor's name in the files.

        The names and the number of tensors may differ from the model's parameters: published files may leave out a
        prefix, or may hold tensors that loading computes anew.

        Raises:
            ConfigError: a file of weights is missing or damaged.
        """
        return {name: shape for file in self.weights for name, shape in read_shapes(self.place, file).items()}

    def check_causal_lm(self) -> None:
        """Raise ConfigError unless config.json names a causal language model without an encoder."""
        is_named = any(name.endswith(_CAUSAL_LM) for name in self.architecture.split(", "))
        if not is_named or self.settings.get("is_encoder_decoder"):
            found = f"holds a {self.architecture}" if self.architecture else "names no architecture in config.json"
            raise ConfigError(self.place, f"{self.path} {found}", "name the folder of a causal language model")

    def check_trainable(self) -> None:
        """Raise ConfigError unless the folder holds a causal language model whose weights can be trained.

        Quantised weights cannot be trained, and engines do not load an adapter beside the weights.
        """
        self.check_causal_lm()
        quantized = next((key for key in _QUANTIZATION_KEYS if self.settings.get(key) or self.text.get(key)), None)
        file = next((name for name in _QUANTIZATION_FILES if (self.path / name).is_file()), None)
        if quantized or file:
            where = f"config.json: {quantized}" if quantized else file
            settings = self.settings.get(quantized) or self.text.get(quantized) if quantized else None
            if isinstance(settings, dict) and settings.get("quant_method"):
                where = f"{where}.quant_method {settings['quant_method']!r}"
            problem = f"{self.path} holds quantised weights ({where}), which cannot be trained"
            raise ConfigError(self.place, problem, "name the folder of the model before it was quantised")
        if (self.path / "adapter_config.json").is_file():
            problem = (
                f"{self.path} holds an adapter beside the weights (adapter_config.json), which engines do not load"
            )
            raise ConfigError(self.place, problem, "merge it into the weights, or remove it")

    def check_known(self, trust_remote_code: bool) -> None:
        """Raise ConfigError unless there is code for the architecture, in transformers or in the folder.

        Args:
            trust_remote_code: whether Python code in the folder may run.

        Raises:
            ConfigError: transformers does not know the architecture, or the folder's code may not run.
        """
        if self.settings.get("auto_map"):
            if not trust_remote_code:
                problem = (
                    f"{self.path} brings Python code of its own for {self.architecture}, which does not run unasked"
                )
                raise ConfigError(self.place, problem, "set model.trust_remote_code to true if you trust it")
            return
        model_type = self.settings.get("model_type")
        if not _is_known_type(str(model_type)):
            problem = f"{self.path} holds a {self.architecture} of model_type {model_type!r}, which transformers "
            problem += f"{importlib.metadata.version('transformers')} does not know"
            raise ConfigError(self.place, problem, "correct config.json or install a newer transformers")

    def check_tokenizer(self) -> None:
        """Raise ConfigError if the folder has no file of a tokenizer."""
        if any((self.path / name).exists() for name in _TOKENIZER_FILES) or any(self.path.glob("*.tiktoken")):
            return
        problem = f"{self.path} has no tokenizer (tokenizer.json)"
        raise ConfigError(self.place, problem, "save the model's tokenizer into the same folder")


def _read_config(place: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        problem = f"{file.parent} has no config.json"
        raise ConfigError(place, problem, "name a Hugging Face model folder") from error
    except OSError as error:
        raise ConfigError(place, f"{file} cannot be read ({error.strerror})", "make it readable") from error
    except ValueError as error:
        raise ConfigError(place, f"{file} is not JSON ({error})", EXPORT_AGAIN) from error
    if not isinstance(settings, dict):
        raise ConfigError(place, f"{file} is not a JSON object", EXPORT_AGAIN)
    return settings


def _is_known_type(model_type: str) -> bool:
    """Return whether the tables of transformers name the type. The text of the tables is searched, because an import
    takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return True
    tables = [file.read_text(encoding="utf-8") for file in (Path(spec.origin).parent / "models" / "auto").glob("*.py")]
    return not tables or any(f'"{model_type}"' in table for table in tables)
