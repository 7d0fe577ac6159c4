"""The reference service's section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rollmesh.config.section import Section
from rollmesh.config.shared import Attention, ModelSection, PositiveInt
from rollmesh.errors import ConfigError


class ReferenceSection(Section):
    address: str = "127.0.0.1:0"
    """host:port of the reference server. Not started where algorithm.kl.coef is 0."""
    model_path: Path | None = None
    """The frozen policy; defaults to model.path."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Attention = "auto"
    """transformers' attn_implementation; "auto" takes what is right for the model. As learner.attention."""
    tokens_per_batch: PositiveInt = 8192
    """Tokens in one forward pass, padding included."""
    num_threads: PositiveInt = 1
    """Threads of the forward pass on CPU."""

    def check_sample_fits(self, model: ModelSection) -> None:
        """Raises ConfigError if the longest sample is larger than a forward pass."""
        if model.max_length > self.tokens_per_batch:
            raise ConfigError(
                "reference.tokens_per_batch",
                f"{self.tokens_per_batch} cannot hold one sample of model.max_length {model.max_length}",
                "raise it to at least that",
            )
