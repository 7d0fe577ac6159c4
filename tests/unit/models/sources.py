"""Model folders as the tests load them."""

from __future__ import annotations

from pathlib import Path

import torch

from rollmesh.models.loading import ModelSource


def source_of(folder: Path, attention: str = "auto", dtype: str = "float32") -> ModelSource:
    """In float32 on the CPU unless said otherwise."""
    return ModelSource(folder, dtype, attention, torch.device("cpu"), False, "model.path", "learner.attention")
