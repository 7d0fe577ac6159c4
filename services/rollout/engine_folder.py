"""The model folder as vLLM may read it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollmesh.data.model_folder import ModelFolder


@contextmanager
def engine_folder(folder: ModelFolder) -> Iterator[Path]:
    """The folder with its weights in one layout alone; to be kept until vLLM has started.

    vLLM loads every safetensors file that no index rules out, and prefers Mistral's own layout where it finds that. A
    folder with a second copy of the weights is therefore replaced by a temporary one, which links to the other files.
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
