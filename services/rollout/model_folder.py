"""What a Hugging Face model folder says about itself, read without transformers or torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError, InvalidArgumentError
from rollmesh.types import WeightPlan

_GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder.

    Attributes:
        shapes: of each tensor in the safetensors files, by name; None where the weights have another format.
        is_tied: whether input and output embeddings are one tensor.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]] | None
    is_tied: bool

    @classmethod
    def read(cls, path: Path) -> ModelFolder:
        """Check that ``path`` holds a causal language model.

        Raises:
            ConfigError: it does not; the message says what is missing.
        """
        if not path.is_dir():
            raise ConfigError("model.path", f"{path} is not a folder", "name a Hugging Face model folder")
        config = _read_config(path)
        architectures = config.get("architectures") or []
        if not any(name.endswith(_GENERATIVE) for name in architectures):
            what = f"is a {', '.join(architectures)}" if architectures else "names no architecture in config.json"
            raise ConfigError("model.path", f"{path} {what}", "name the folder of a causal language model")
        text = config.get("text_config", {})
        is_tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        return cls(path, _read_shapes(path), is_tied)

    def check_plan(self, plan: WeightPlan) -> None:
        """Check that a plan brings every tensor of this model, in its shape.

        An engine that loads less goes on with a mixture of old and new weights and says nothing.

        Raises:
            InvalidArgumentError: a tensor is missing, unknown or of another shape.
        """
        if self.shapes is None:
            return
        planned = {tensor.name: tensor.shape for tensor in plan.tensors}
        for name, shape in planned.items():
            is_tied_head = self.is_tied and name.endswith("lm_head.weight")
            if name not in self.shapes and not is_tied_head:
                raise InvalidArgumentError(f"{self.path} has no tensor {name!r}", "plan.tensors")
            if self.shapes.get(name, shape) != shape:
                raise InvalidArgumentError(
                    f"{name} has shape {shape} in the plan and {self.shapes[name]} in {self.path}", "plan.tensors"
                )
        optional = {name for name in self.shapes if self.is_tied and name.endswith("lm_head.weight")}
        missing = sorted(self.shapes.keys() - planned.keys() - optional)
        if missing:
            raise InvalidArgumentError(
                f"the plan lacks {len(missing)} tensors of {self.path}, {missing[0]!r} first", "plan.tensors"
            )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("model.path", f"{file} cannot be read", "name a Hugging Face model folder") from error
    except ValueError as error:
        raise ConfigError("model.path", f"{file} is not JSON ({error})", "repair the model folder") from error
    if not isinstance(config, dict):
        raise ConfigError("model.path", f"{file} holds no mapping", "repair the model folder")
    return config


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name != "__metadata__":
                shapes[name] = tuple(entry["shape"])
    return shapes


def _read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: its length as little-endian uint64, then the text."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no mapping")
            return header
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError("model.path", f"{file} is damaged ({error})", "copy the model folder again") from error
