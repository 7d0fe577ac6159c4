"""The checkpoints and exports of a run.

A checkpoint is copied to main memory, then written beside training under a temporary name, synced to disk, and renamed.
So a folder with the final name is complete.

::

    step loop, all ranks:   save: waits for the write before, copies ──► trains on ......... ──► take_saved: retires
    background, each rank:                                         └──► files ─► rename ─► exports ─► old ones removed

    checkpoints/step-000060/
        manifest.json                    the record of the checkpoint; written last
        policy/step-000060/              model and optimiser of the policy, as DeepSpeed lays them out
        critic/step-000060/              model and optimiser of the critic, if the run has a critic
        average/rank-00000.safetensors   each rank's part of the policy's average, if the run keeps an average
        rng/rank-00000.json              the random generators of each rank; each rank writes this file last
    export-step-000060/                  the policy as a Hugging Face folder; the last export of a run is export/
        average/                         the average as a Hugging Face folder, if the run keeps an average
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from torch import Tensor

from rollmesh.config.shared import RunSection
from rollmesh.errors import ConfigError
from rollmesh.telemetry.evaluations import best_step, read_scores
from rollmesh.types import PolicyVersion
from services.learner.background_write import BackgroundWrite
from services.learner.checkpoint_schedule import CheckpointSchedule
from services.learner.checkpoint_writer import CheckpointCopy, CheckpointWriter, explained, random_file
from services.learner.config import LearnerSection
from services.learner.critic import CriticEngine
from services.learner.ema import PolicyAverage
from services.learner.engine import PolicyEngine
from services.learner.manifest import SCHEMA, Manifest, read_manifest
from services.learner.random_state import random_state, restore_random_state
from services.learner.ranks import Ranks
from services.learner.replacement import publish_folder, restore_replaced
from services.learner.rotation import steps_to_drop

_logger = logging.getLogger(__name__)

_TEMPORARY = ".partial"


@dataclass(frozen=True, slots=True)
class Learnables:
    """The engines that a learner trains. ``critic`` and ``average`` are None where the configuration has none."""

    policy: PolicyEngine
    critic: CriticEngine | None = None
    average: PolicyAverage | None = None

    def count_work(self, count: Callable[[], None]) -> None:
        """Call ``count`` at each forward pass, and each time that weights are gathered."""
        self.policy.count_work = count
        if self.critic is not None:
            self.critic.engine.count_work = count


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that has become durable.

    Attributes:
        step: the last step that the checkpoint covers.
        write_s: seconds from the beginning of its copy until it was durable.
    """

    step: int
    write_s: float


@dataclass(frozen=True, slots=True)
class ExportCopy:
    """Weights in main memory that are to be written as a Hugging Face folder.

    Attributes:
        folder: the place of the folder in the export; "." for the export itself.
        weights: the whole weights, by their names in the model.
        engine: the policy, which writes the folder.
    """

    folder: str
    weights: Mapping[str, Tensor]
    engine: PolicyEngine


class CheckpointStore:
    """The checkpoints and exports of a run. Every rank has a store, and all ranks call the same method together.

    Args:
        run: name and folder of the run.
        section: the learner's settings.
        config_hash: SHA-256 of the resolved configuration, as hexadecimal digits.
        ranks: the process group.
    """

    def __init__(self, run: RunSection, section: LearnerSection, config_hash: str, ranks: Ranks) -> None:
        self._run = run
        self._section = section
        self._config_hash = config_hash
        self._ranks = ranks
        self._folder = run.folder / "checkpoints"
        self._writer = CheckpointWriter(ranks.rank, ranks.world_size, section.silent_work_timeout_s)
        self._schedule = CheckpointSchedule(section.checkpoint, ranks)
        self._write: BackgroundWrite | None = None
        self._saved: SimpleQueue[SavedCheckpoint] = SimpleQueue()
        if ranks.is_first:
            self._tidy()

    def _tidy(self) -> None:
        """Remove what an earlier process left half written, and finish a replacement that it had begun."""
        for parent, prefix in ((self._folder, ""), (self._run.folder, "export")):
            restore_replaced(parent)
            for leftover in parent.glob(f"{prefix}*{_TEMPORARY}"):
                shutil.rmtree(leftover)

    def save(
        self, learnables: Learnables, state: Mapping[str, float], step: int, version: PolicyVersion, *, is_last: bool
    ) -> None:
        """Copy a checkpoint to main memory, with an export if the settings ask for one, and begin to write. Collective.

        Call `wait` before. On return training may go on. `take_saved` tells when the checkpoint is on disk.

        Args:
            learnables: the engines that the learner trains.
            state: the numbers of trainer and loop.
            step: the last step that was trained.
            version: the version that ``step`` made.
            is_last: whether the run ends with ``step``.

        Raises:
            ConfigError: the folder cannot be written.
        """
        started = time.monotonic()
        self._schedule.begin()
        copy = self._copy(learnables, state, step, version)
        exports = self._copy_weights(learnables) if self._section.checkpoint.should_export else []

        def write() -> None:
            self._writer.write(copy)
            if self._ranks.is_first:
                self._saved.put(SavedCheckpoint(step, time.monotonic() - started))
            self._write_export(exports, step, is_last)

        self._write = BackgroundWrite(write)

    def export(self, learnables: Learnables, step: int, *, is_last: bool) -> None:
        """Copy the policy and its average to main memory, and begin to write them as Hugging Face folders. Collective.

        The export of the last step is ``export``, every other export is ``export-step-000060`` or alike. Call `wait`
        before.
        """
        exports = self._copy_weights(learnables)
        self._write = BackgroundWrite(lambda: self._write_export(exports, step, is_last))

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until this rank writes nothing.

        Args:
            check: called again and again meanwhile; raises an error when the run is over.

        Raises:
            ConfigError: a checkpoint or an export could not be written.
            DeadlineError: another rank did not write its part of the checkpoint.
        """
        if self._write is not None:
            self._write.wait(check)

    def take_saved(self) -> SavedCheckpoint | None:
        """Return the checkpoint that has become durable since the last call; None for none. Returns at once.

        On ranks other than 0 the answer is always None.

        Raises:
            ConfigError: a checkpoint or an export could not be written.
            DeadlineError: another rank did not write its part of the checkpoint.
        """
        if self._write is not None:
            self._write.check()
        return None if self._saved.empty() else self._saved.get()

    def _copy(
        self, learnables: Learnables, state: Mapping[str, float], step: int, version: PolicyVersion
    ) -> CheckpointCopy:
        """Return this rank's part of a checkpoint. Collective."""
        name = _name(step)
        final, partial = self._folder / name, self._folder / (name + _TEMPORARY)
        with explained(final):
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                for folder in ("rng", "average") if learnables.average is not None else ("rng",):
                    (partial / folder).mkdir(parents=True)
            self._ranks.barrier()
            files = learnables.policy.copy_state(partial / "policy", name)
            if learnables.critic is not None:
                files += learnables.critic.engine.copy_state(partial / "critic", name)
            if learnables.average is not None:
                files += learnables.average.copy_state(partial / "average")
        return CheckpointCopy(partial, final, files, random_state(), self._manifest(learnables, state, step, version))

    def _copy_weights(self, learnables: Learnables) -> list[ExportCopy]:
        """Return the weights that are to be exported, on ranks other than 0 nothing. Collective."""
        exports = [ExportCopy(".", learnables.policy.copy_weights(), learnables.policy)]
        if learnables.average is not None:
            exports.append(ExportCopy("average", learnables.average.copy_weights(), learnables.policy))
        return exports if self._ranks.is_first else []

    def _write_export(self, exports: Sequence[ExportCopy], step: int, is_last: bool) -> None:
        """Write an export, if there is one, and remove the oldest checkpoints and exports."""
        if not self._ranks.is_first:
            return
        final = self._run.folder / ("export" if is_last else f"export-{_name(step)}")
        with explained(final):
            if exports:
                partial = final.with_name(final.name + _TEMPORARY)
                shutil.rmtree(partial, ignore_errors=True)
                for each in exports:
                    each.engine.write_pretrained(partial / each.folder, each.weights)
                publish_folder(partial, final)
            self._drop_old(step)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step``. Collective."""
        return self._schedule.is_due(step)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        if not self._folder.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def drop_later(self, step: int) -> None:
        """Delete the checkpoints and exports of steps after ``step``: the run goes on there and makes later steps anew.

        Otherwise a later start could take such a checkpoint for one of the steps that were made anew. Does nothing on
        ranks other than 0.
        """
        for later in self.steps() if self._ranks.is_first else []:
            if later > step:
                for folder in self._folders(later):
                    _remove(folder)
                _logger.warning("the checkpoint of step %d is deleted: the run goes on from step %d", later, step)

    def load(self, learnables: Learnables, step: int) -> Manifest:
        """Restore models, optimisers, the average, and this rank's random generators. Collective.

        Returns:
            The manifest, which holds the numbers of trainer and loop.

        Raises:
            ConfigError: the checkpoint is missing or cannot be read, or this learner has another number of ranks,
                another ZeRO stage or other parts.
        """
        folder = self._folder / _name(step)
        manifest = read_manifest(folder)
        self._check(manifest, learnables, folder)
        learnables.policy.load(folder / "policy", manifest.deepspeed_tag)
        if learnables.critic is not None:
            learnables.critic.engine.load(folder / "critic", manifest.deepspeed_tag)
        if learnables.average is not None:
            learnables.average.load(folder / "average")
        restore_random_state(random_file(folder, self._ranks.rank).read_text(encoding="utf-8"))
        return manifest

    def _check(self, manifest: Manifest, learnables: Learnables, folder: Path) -> None:
        for place, written, configured in (
            ("learner.num_ranks", manifest.num_ranks, self._ranks.world_size),
            ("learner.zero_stage", manifest.zero_stage, self._section.zero_stage),
        ):
            if written != configured:
                raise ConfigError(place, f"{configured} differs from the {written} of {folder}", f"set it to {written}")
        fix = "set it as in the run that wrote the checkpoint"
        for place, name, is_written, trained in (
            ("algorithm.advantage.estimator", "critic", manifest.has_critic, learnables.critic),
            ("learner.ema_beta", "average of the policy", manifest.has_average, learnables.average),
        ):
            if is_written and trained is None:
                raise ConfigError(place, f"makes no use of the {name} that {folder} holds", fix)
            if not is_written and trained is not None:
                raise ConfigError(place, f"needs the {name}, which {folder} does not hold", fix)

    def _manifest(
        self, learnables: Learnables, state: Mapping[str, float], step: int, version: PolicyVersion
    ) -> Manifest:
        return Manifest(
            schema_version=SCHEMA,
            run=self._run.name,
            lineage=version.lineage,
            step=step,
            policy_version=str(version),
            deepspeed_tag=_name(step),
            num_ranks=self._ranks.world_size,
            zero_stage=self._section.zero_stage,
            has_critic=learnables.critic is not None,
            has_average=learnables.average is not None,
            state=dict(state),
            config_hash=self._config_hash,
        )

    def _drop_old(self, newest: int) -> None:
        """Delete the checkpoints and exports of steps that the settings do not keep. ``newest`` is the newest step."""
        section = self._section.checkpoint
        sizes = {step: sum(map(_size, self._folders(step))) for step in self.steps() if step <= newest}
        best = None
        if section.keep_best is not None:
            scores = _read_scores(self._run.folder, section.keep_best)
            candidates = {step: score for step, score in scores.items() if step in sizes}
            best = best_step(candidates, is_highest_best=section.best_is == "highest")
        for step in steps_to_drop(sizes, best, section.max_kept, section.max_bytes):
            for folder in self._folders(step):
                _remove(folder)

    def _folders(self, step: int) -> list[Path]:
        """Return the existing folders of a step: its checkpoint and its export."""
        name = _name(step)
        return [path for path in (self._folder / name, self._run.folder / f"export-{name}") if path.is_dir()]


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _remove(folder: Path) -> None:
    """Remove a folder. The folder loses its name first, so that no half of it can be taken for a whole."""
    aside = folder.with_name(folder.name + _TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_scores(folder: Path, metric: str) -> dict[int, float]:
    try:
        return read_scores(folder, metric)
    except ConfigError as error:
        _logger.warning("no checkpoint is kept as the best: %s", error)
        return {}
