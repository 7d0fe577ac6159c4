"""The recorder of batches: it writes each batch with everything on which its step depends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rollmesh.config import ReplaySection, Section, WeightsSection, with_absolute_paths
from rollmesh.errors import ConfigError
from rollmesh.replay.recording import RecordedStep, record_batch, recorded_paths
from rollmesh.types import Group, PolicyVersion
from services.config import MeshConfig, dump_mesh


class BatchRecorder:
    """The recorder of a run's batches, on rank 0.

    The files hold the lineage that survives: a step that is trained again replaces its file, and the files of steps
    that were rolled back are removed.

    Args:
        folder: the folder of the recorded batches.
        settings: the learner's configuration, from `learner_settings`.
        num_ranks: the number of ranks that train a batch.
        num_batches: the number of batches of the whole run.
    """

    def __init__(self, folder: Path, settings: str, num_ranks: int, num_batches: int) -> None:
        self._folder = folder
        self._settings = settings
        self._num_ranks = num_ranks
        self._num_batches = num_batches

    def cut(self, after_step: int) -> None:
        """Remove the batches of steps after ``after_step``, because these steps are trained again."""
        for step, path in recorded_paths(self._folder).items():
            if step > after_step:
                path.unlink()

    def record(self, step: int, version: PolicyVersion, groups: Sequence[Group]) -> None:
        """Write the batch of a step. On return the file is on disk.

        Args:
            step: number of the step, from 1.
            version: the version that the step starts from.
            groups: the groups of all ranks, in the order of the batch.

        Raises:
            ConfigError: the file cannot be written, for example because the disk is full.
        """
        facts = RecordedStep(step, str(version), self._num_ranks, self._num_batches, self._settings)
        try:
            record_batch(self._folder, facts, groups)
        except OSError as error:
            problem = f"the batch of step {step} cannot be written to {self._folder} ({error.strerror})"
            fix = "make room, or switch it off; then `rollmesh resume` goes on with the run"
            raise ConfigError("learner.should_record_batches", problem, fix) from error


def learner_settings(config: MeshConfig) -> str:
    """Return the configuration as YAML, without the values that change from one start to the next.

    Ports, addresses, the run's id and the URL of Redis do not influence a step. So two starts with the same settings
    have the same text, and no password is recorded.
    """
    changes: dict[str, Section] = {
        "run": config.run.model_copy(update={"id": None}),
        "replay": ReplaySection(),
        "weights": WeightsSection(),
    }
    for name in ("coordinator", "rollout", "learner", "reference", "reward"):
        section = getattr(config, name)
        if section is None or (name == "reward" and config.reward.function is None):
            continue
        address = type(section).model_fields["address"].default
        changes[name] = section.model_copy(update={"address": address})
    return dump_mesh(with_absolute_paths(config.model_copy(update=changes)))
