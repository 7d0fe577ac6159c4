"""The checkpoints and exports of a run.

A checkpoint is written under a temporary name, synced to disk, and renamed. So a folder with the final name is
complete.

::

    checkpoints/step-000060/
        manifest.json                    the record of the checkpoint; written last
        policy/step-000060/              model and optimiser of the policy, as DeepSpeed wrote them
        critic/step-000060/              model and optimiser of the critic, if the run has a critic
        average/rank-00000.safetensors   each rank's part of the policy's average, if the run keeps an average
        rng/rank-00000.json              the random generators of each rank
    export-step-000060/                  the policy as a Hugging Face folder; the last export of a run is export/
        average/                         the average as a Hugging Face folder, if the run keeps an average
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rollmesh.config.shared import RunSection
from rollmesh.errors import ConfigError
from rollmesh.types import PolicyVersion
from services.learner.config import LearnerSection
from services.learner.critic import CriticEngine
from services.learner.ema import PolicyAverage
from services.learner.engine import PolicyEngine
from services.learner.manifest import SCHEMA, Manifest, read_manifest
from services.learner.random_state import random_state, restore_random_state
from services.learner.ranks import Ranks
from services.learner.replacement import publish_folder, restore_replaced, sync_tree

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
        if ranks.is_first:
            for parent in (self._folder, run.folder):
                restore_replaced(parent)

    def save(self, learnables: Learnables, state: Mapping[str, float], step: int, version: PolicyVersion) -> Path:
        """Write a checkpoint, and return its folder once the checkpoint is durable. Collective.

        The oldest checkpoints and exports are removed, so that ``max_kept`` of each remain.

        Args:
            learnables: the engines that the learner trains.
            state: the numbers of trainer and loop.
            step: the last step that was trained.
            version: the version that ``step`` made.
        """
        name = _name(step)
        final, partial = self._folder / name, self._folder / (name + _TEMPORARY)
        if self._ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in ("rng", "average") if learnables.average is not None else ("rng",):
                (partial / folder).mkdir(parents=True)
        self._ranks.barrier()
        learnables.policy.save(partial / "policy", name)
        if learnables.critic is not None:
            learnables.critic.engine.save(partial / "critic", name)
        if learnables.average is not None:
            learnables.average.save(partial / "average")
        self._random_file(partial).write_text(random_state(), encoding="utf-8")
        self._ranks.barrier()
        sync_tree(partial)  # on every rank: a network file system may hold the files of a rank in that machine's memory
        self._ranks.barrier()
        if self._ranks.is_first:
            manifest = self._manifest(learnables, state, step, version)
            (partial / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            publish_folder(partial, final)
            self._drop_old()
        self._ranks.barrier()
        return final

    def export(self, learnables: Learnables, step: int, is_last: bool) -> Path:
        """Write the policy after a step as a Hugging Face folder, with its average in a subfolder. Collective.

        The export of the last step is ``export``, every other export is ``export-step-000060`` or alike.
        """
        final = self._run.folder / ("export" if is_last else f"export-{_name(step)}")
        partial = final.with_name(final.name + _TEMPORARY)
        if self._ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        learnables.policy.export(partial)
        if learnables.average is not None:
            learnables.average.export(partial / "average")
        if self._ranks.is_first:
            publish_folder(partial, final)
            self._drop_old()
        self._ranks.barrier()
        return final

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return _steps_of(self._folder, "")

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
        restore_random_state(self._random_file(folder).read_text(encoding="utf-8"))
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

    def _random_file(self, folder: Path) -> Path:
        return folder / "rng" / f"rank-{self._ranks.rank:05d}.json"

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

    def _drop_old(self) -> None:
        kept = self._section.checkpoint.max_kept
        for folder, prefix in ((self._folder, ""), (self._run.folder, "export-")):
            for step in _steps_of(folder, prefix)[:-kept]:
                shutil.rmtree(folder / (prefix + _name(step)))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _steps_of(folder: Path, prefix: str) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(rf"{prefix}step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)
