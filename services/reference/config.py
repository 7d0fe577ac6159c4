"""The reference service's section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveInt


class ReferenceSection(Section):
    address: str = "127.0.0.1:0"
    """host:port of the reference server. Not started where algorithm.kl.coef is 0."""
    model_path: Path | None = None
    """The frozen policy; defaults to model.path."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokens_per_batch: PositiveInt = 8192
    """Tokens in one forward pass, padding included."""
    num_threads: PositiveInt = 1
    """Threads of the forward pass on CPU."""
