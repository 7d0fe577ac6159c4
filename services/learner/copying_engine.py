"""The part of DeepSpeed that writes the files of a checkpoint, replaced by one that copies their content.

Import this module after `engine` has imported DeepSpeed for its device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from services.learner.host_copy import PendingFile, copy_to_host, write_state


class CopyingCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """A checkpoint engine of DeepSpeed that reads files as usual, and collects the files that are to be written.

    DeepSpeed calls `save` while it gathers the state of a model. The engine keeps a copy of that state in main memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._files: list[PendingFile] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Copy a state, which is to be written to ``path``."""
        state = copy_to_host(state_dict)
        self._files.append(PendingFile(Path(path), lambda path: write_state(state, path)))

    def take(self) -> list[PendingFile]:
        """Return the files that DeepSpeed has saved since the last call."""
        files, self._files = self._files, []
        return files
