"""The reference service's section of the mesh file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rollmesh.config.section import Section
from rollmesh.config.shared import Attention, ModelSection, PositiveInt
from rollmesh.errors import ConfigError


class ReferenceSection(Section):
    """Settings of the reference service, which computes log-probabilities under a frozen policy."""

    address: str = "127.0.0.1:0"
    """The host:port of the reference server. The mesh starts no reference server where algorithm.kl.coef is 0."""
    model_path: Path | None = None
    """The model folder of the frozen policy; null takes model.path."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the parameters; auto takes the dtype of the files."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device of the reference server. auto: CUDA where there is a CUDA device, else the CPU."""
    attention: Attention = "auto"
    """The attention implementation (transformers' attn_implementation). "auto" takes the implementation that is right
    for the model, like learner.attention."""
    tokens_per_batch: PositiveInt = 8192
    """The most tokens of one forward pass, padding included."""
    num_threads: PositiveInt = 1
    """The number of threads of the forward pass on CPU."""

    def check_sample_fits(self, model: ModelSection) -> None:
        """Raise ConfigError if the longest sample does not fit into a forward pass."""
        if model.max_length > self.tokens_per_batch:
            raise ConfigError(
                "reference.tokens_per_batch",
                f"{self.tokens_per_batch} cannot hold one sample of model.max_length {model.max_length}",
                "raise it to at least that",
            )
