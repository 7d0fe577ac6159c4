"""The translation from the parameters of a model in training to the tensors of its checkpoint.

A model of transformers may hold several tensors of its checkpoint as one parameter, such as the experts of a mixture.
transformers splits this parameter when it saves the model. Engines load the tensors of a checkpoint, so weights are
published as these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rollmesh.errors import ConfigError
from rollmesh.types import TensorSpec


class CheckpointNames:
    """The translation from parameters to tensor names of the checkpoint.

    Args:
        model: the model, from transformers.
        parameters: the specs of its whole parameters, in the order in which they are sent.

    Attributes:
        specs: the tensors of the checkpoint with the same weights. The tensors of one parameter follow each other.

    Raises:
        ConfigError: the checkpoint stores several parameters of the model as one tensor.
    """

    def __init__(self, model: Any, parameters: Sequence[TensorSpec]) -> None:
        self._model = model
        empty = {spec.name: _empty(spec) for spec in parameters}
        parts = {name: _converted(model, {name: tensor}) for name, tensor in empty.items()}
        flat = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
        if _shapes(flat) != _shapes(_converted(model, empty)):
            problem = f"{type(model).__name__} holds several parameters that its checkpoint stores as one tensor"
            raise ConfigError("model.path", problem, "train another model: weights of this one cannot be published")
        self._parameter = {part: name for name, tensors in parts.items() for part in tensors}
        self._is_converted = {name: _shapes(tensors) != _shapes({name: empty[name]}) for name, tensors in parts.items()}
        dtypes = {spec.name: spec.dtype for spec in parameters}
        self.specs = tuple(
            TensorSpec(part, dtypes[name], tuple(tensor.shape))
            for name, tensors in parts.items()
            for part, tensor in tensors.items()
        )

    def parameters_of(self, names: Iterable[str]) -> list[str]:
        """Return the parameters that hold these tensors of the checkpoint, each parameter once."""
        return list(dict.fromkeys(self._parameter[name] for name in names))

    def convert(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint for whole parameters, by name. Equal tensors are not copied."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            tensors |= _converted(self._model, {name: tensor}) if self._is_converted[name] else {name: tensor}
        return tensors


def stored_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the parameters, tied parameters once, then of the buffers that a checkpoint stores.

    Such a buffer is, for example, a router's correction of the load. Engines hold the buffer as a parameter. An export
    without the buffer would load with zeros in its place.
    """
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            yield name, buffer


def _converted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
