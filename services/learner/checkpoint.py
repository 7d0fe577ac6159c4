"""Checkpoints: written to a temporary name, synced, renamed; what has the final name is complete.

::

    checkpoints/step-000060/
        manifest.json          what the checkpoint belongs to; written last
        deepspeed/step-000060/ model and optimiser, as DeepSpeed wrote them
        rng/rank-00000.json    the random generators of each rank
    export-step-000060/        a Hugging Face folder, beside the checkpoints (the run's last one is export/)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from rollmesh.errors import ConfigError
from rollmesh.types import PolicyVersion
from services.config import MeshConfig, dump_mesh
from services.learner.engine import TrainingEngine
from services.learner.ranks import Ranks

SCHEMA = 1
_TEMPORARY = ".partial"


class Manifest(BaseModel):
    """What a checkpoint belongs to.

    The learning rate follows from ``step``; the KL coefficient is constant: neither has state to be kept. Groups
    trained in steps up to ``step`` are covered, later ones are not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    run: str
    lineage: int
    step: int
    """Optimiser batches trained; also the last step whose groups the checkpoint covers in the ledger."""
    policy_version: str
    """The version that ``step`` made, as "lineage.number"."""
    deepspeed_tag: str
    num_ranks: int
    zero_stage: int
    config_hash: str
    """SHA-256 of the resolved configuration."""

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion.parse(self.policy_version)


class CheckpointStore:
    """The checkpoints and exports in a run folder. All ranks have one and call it together.

    Args:
        config: the mesh's configuration.
        ranks: the process group.
    """

    def __init__(self, config: MeshConfig, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._folder = config.run.folder / "checkpoints"

    def save(self, engine: TrainingEngine, step: int, version: PolicyVersion) -> Path:
        """Write a checkpoint; on return it is durable. Drops the oldest ones over ``max_kept``. Collective."""
        name = _name(step)
        final, partial = self._folder / name, self._folder / (name + _TEMPORARY)
        if self._ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "rng").mkdir(parents=True)
        self._ranks.barrier()
        engine.save(partial / "deepspeed", name)
        (partial / "rng" / f"rank-{self._ranks.rank:05d}.json").write_text(_random_state(), encoding="utf-8")
        _sync_tree(partial / "rng")
        self._ranks.barrier()
        if self._ranks.is_first:
            manifest = self._manifest(step, version, name)
            (partial / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            _publish_folder(partial, final)
            self._drop_old()
        self._ranks.barrier()
        return final

    def export(self, engine: TrainingEngine, step: int, is_last: bool) -> Path:
        """Write a Hugging Face folder of the policy after a step. Collective."""
        final = self._config.run.folder / ("export" if is_last else f"export-{_name(step)}")
        partial = final.with_name(final.name + _TEMPORARY)
        if self._ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        engine.export(partial, self._config.model.path)
        if self._ranks.is_first:
            _publish_folder(partial, final)
            self._drop_old()
        self._ranks.barrier()
        return final

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return _steps_of(self._folder, "")

    def load(self, engine: TrainingEngine, step: int) -> Manifest:
        """Restore model, optimiser and this rank's random generators. Collective.

        Raises:
            ConfigError: there is no such checkpoint, it cannot be read, or it was written with other ranks or
                another ZeRO stage.
        """
        folder = self._folder / _name(step)
        manifest = _read_manifest(folder)
        section = self._config.learner
        for place, written, configured in (
            ("learner.num_ranks", manifest.num_ranks, self._ranks.world_size),
            ("learner.zero_stage", manifest.zero_stage, section.zero_stage),
        ):
            if written != configured:
                raise ConfigError(place, f"{configured} differs from the {written} of {folder}", f"set it to {written}")
        engine.load(folder / "deepspeed", manifest.deepspeed_tag)
        _restore_random_state((folder / "rng" / f"rank-{self._ranks.rank:05d}.json").read_text(encoding="utf-8"))
        return manifest

    def _manifest(self, step: int, version: PolicyVersion, tag: str) -> Manifest:
        return Manifest(
            schema_version=SCHEMA,
            run=self._config.run.name,
            lineage=version.lineage,
            step=step,
            policy_version=str(version),
            deepspeed_tag=tag,
            num_ranks=self._ranks.world_size,
            zero_stage=self._config.learner.zero_stage,
            config_hash=hashlib.sha256(dump_mesh(self._config).encode()).hexdigest(),
        )

    def _drop_old(self) -> None:
        kept = self._config.learner.checkpoint.max_kept
        for folder, prefix in ((self._folder, ""), (self._config.run.folder, "export-")):
            for step in _steps_of(folder, prefix)[:-kept]:
                shutil.rmtree(folder / (prefix + _name(step)))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _steps_of(folder: Path, prefix: str) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(rf"{prefix}step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(str(path), "is not the manifest of a checkpoint", "name a complete checkpoint") from error
    if manifest.schema_version != SCHEMA:
        raise ConfigError(
            str(path),
            f"has schema {manifest.schema_version}, this version reads {SCHEMA}",
            "use the version that wrote it",
        )
    return manifest


def _random_state() -> str:
    """The state of Python's, NumPy's and torch's generators as JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }
    return json.dumps(state)


def _restore_random_state(text: str) -> None:
    state = json.loads(text)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _publish_folder(partial: Path, final: Path) -> None:
    """Sync a folder to disk and give it its name, in place of an older one."""
    _sync_tree(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for file in files:
            _sync(Path(path, file))
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
