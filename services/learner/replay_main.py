"""The entry of a learner that repeats a part of a replay: checks first, slow imports last, as in `main`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rollmesh.replay.replay_part import ReplayPart
from rollmesh.telemetry import logs
from services.config import load_mesh
from services.learner.checks import check_start
from services.learner.rank_processes import run_ranks


def main(file: Path) -> int:
    """Repeat one part of a replay, and end the process. The exit code is 0 only if every step was repeated.

    Args:
        file: the part, as `ReplayPart.write` wrote it.

    Raises:
        ConfigError: the part cannot be repeated with its settings.
        StartAgainError: a rank was killed.
        RollMeshError: a batch is damaged, or a step failed.
    """
    part = ReplayPart.read(file)
    config = load_mesh(Path(part.settings))
    check_start(config.learner, config.model, config.algorithm.needs_critic)
    if config.learner.num_ranks > 1 and "RANK" not in os.environ:
        command = [sys.executable, "-P", "-m", "rollmesh.cli", "replay", part.out, "--part", str(file)]
        return run_ranks(command, config.learner.num_ranks, "replay")
    logs.configure(config.run.name, f"replay-rank-{os.environ.get('RANK', '0')}")
    # torch, transformers and DeepSpeed take seconds to import.
    from services.learner.process import quiet_libraries
    from services.learner.ranks import Ranks, leave
    from services.learner.repeat import repeat

    quiet_libraries()
    ranks = Ranks.start(config.learner)
    repeat(part, config, ranks)
    ranks.stop()
    return leave(0)
