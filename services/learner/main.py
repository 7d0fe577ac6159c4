"""The entry of the learner: checks first, slow imports last. One process, or one child process for each rank.

::

    rollmesh learner ──num_ranks > 1──► rank_processes ──► rollmesh learner, RANK=0 .. n-1
                     └──num_ranks = 1──────────────────► run
"""

from __future__ import annotations

import json
import os
import sys

from rollmesh.errors import ConfigError
from rollmesh.weights.interface import keep_to_interface
from services.config import MeshConfig
from services.learner.checks import check_start
from services.learner.rank_processes import run_ranks


def main(config: MeshConfig, name: str) -> int:
    """Run the learner until the run is over, and end the process. The exit code is 0 only if the run finished.

    Args:
        config: the mesh's configuration.
        name: the name of this member. Ranks other than 0 are not members.

    Raises:
        ConfigError: the learner cannot start with this configuration.
        StartAgainError: a rank was killed; a new start of all ranks may go on with the run.
        RollMeshError: the run failed.
    """
    check_start(config.learner, config.model, config.algorithm.needs_critic)
    config.replay.require_url()
    keep_to_interface(config.weights.host)
    if config.learner.num_ranks > 1 and "RANK" not in os.environ:
        return run_ranks(_rank_command(name), config.learner.num_ranks, name)
    # torch, transformers and DeepSpeed take seconds to import.
    from services.learner.process import run
    from services.learner.ranks import leave

    return leave(run(config, name))


def _rank_command(name: str) -> list[str]:
    """Return the command that starts one rank of this learner."""
    path = os.environ.get("ROLLMESH_CONFIG")
    if path is None:
        raise ConfigError("learner.num_ranks", "several ranks need ROLLMESH_CONFIG", "start it as `rollmesh learner`")
    overrides = [f"--set={override}" for override in json.loads(os.environ.get("ROLLMESH_OVERRIDES", "[]"))]
    return [sys.executable, "-P", "-m", "rollmesh.cli", "learner", "--config", path, "--name", name, *overrides]
