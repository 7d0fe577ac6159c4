"""The record of a checkpoint: the file `manifest.json` in the checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from rollmesh.errors import ConfigError
from rollmesh.types import PolicyVersion

SCHEMA = 2


class Manifest(BaseModel):
    """The record of a checkpoint: its run, its step, its parts, and the numbers that are not tensors.

    The learning rate follows from ``step``, so the manifest does not hold the state of a schedule. The checkpoint
    covers the groups of the steps up to ``step``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    run: str
    lineage: int
    step: int
    """The last step that was trained, and the last step whose groups the checkpoint covers in the ledger."""
    policy_version: str
    """The version that ``step`` made, as "lineage.number"."""
    deepspeed_tag: str
    num_ranks: int
    zero_stage: int
    has_critic: bool
    has_average: bool
    state: dict[str, float]
    """The numbers of trainer and loop with which a resumed run goes on."""
    config_hash: str
    """SHA-256 of the resolved configuration."""

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion.parse(self.policy_version)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the checkpoint in ``folder``.

    Raises:
        ConfigError: the manifest is missing, cannot be read, or was written by another version of RollMesh.
    """
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        schema = content.get("schema_version", SCHEMA)
        if schema == SCHEMA:
            return Manifest.model_validate(content)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(str(path), "is not the manifest of a checkpoint", "name a complete checkpoint") from error
    raise ConfigError(str(path), f"has schema {schema}, this version reads {SCHEMA}", "use the version that wrote it")
