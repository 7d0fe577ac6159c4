"""Shows vLLM a model folder that holds the weights once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollmesh.data.model_folder import ModelFolder


@contextmanager
def engine_folder(folder: ModelFolder) -> Iterator[Path]:
    """Yield a folder that holds the weights in one layout only. Keep the block open until vLLM has started.

    vLLM loads every safetensors file that no index rules out, and prefers Mistral's own layout where the folder has
    that layout. For a folder with a second copy of the weights, this function makes a temporary folder. The temporary
    folder links to all files except the second copy.
    """
    hidden = folder.second_copies
    if not hidden:
        yield folder.path
        return
    with tempfile.TemporaryDirectory(prefix="rollmesh-model-") as name:
        for file in folder.path.iterdir():
            if file not in hidden:
                Path(name, file.name).symlink_to(file.resolve())
        yield Path(name)
