"""A part of a replay, as the launcher asks the learner for it: a file with one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rollmesh.errors import ConfigError
from rollmesh.telemetry.whole_file import write_whole


@dataclass(frozen=True, slots=True)
class ReplayPart:
    """Steps in sequence that one learner repeats with the same settings.

    Attributes:
        batches: the folder of the recorded batches.
        first: the first step.
        last: the last step.
        settings: the mesh file.
        start: the folder of the run, or of the replay, that has the checkpoint of the step before ``first``; empty for
            the initial model.
        out: the folder that gets `metrics.jsonl`, and after the last step an export, or a checkpoint for the next part.
        is_last: whether no part follows.
    """

    batches: str
    first: int
    last: int
    settings: str
    start: str
    out: str
    is_last: bool

    def write(self, path: Path) -> None:
        """Write the part to a file.

        Raises:
            OSError: the file cannot be written.
        """
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> ReplayPart:
        """Return the part that `write` wrote.

        Raises:
            ConfigError: the file is missing or holds no part.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            problem = f"is no part of a replay ({error})"
            raise ConfigError(str(path), problem, "start the replay with `rollmesh replay RUN`") from error
