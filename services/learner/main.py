"""The entry of the learner: checks first, slow imports last. One process, or one process a rank under torch's launcher.

::

    rollmesh learner ──num_ranks > 1──► exec torch.distributed.run ──► rollmesh learner, RANK=0 .. n-1
                     └──num_ranks = 1──────────────────────────────► run
"""

from __future__ import annotations

import json
import os
import sys

from rollmesh.errors import ConfigError
from rollmesh.weights.interface import keep_to_interface
from services.config import MeshConfig
from services.learner.checks import check_start

RANKS_HOST = "127.0.0.1"
"""The address at which the ranks on this machine find each other."""


def main(config: MeshConfig, name: str) -> int:
    """Run the learner until the run is over, and end the process. The exit code is 0 only if the run finished.

    Args:
        config: the mesh's configuration.
        name: the name of this member. Ranks other than 0 are not members.

    Raises:
        ConfigError: the learner cannot start with this configuration.
        RollMeshError: the run failed.
    """
    check_start(config.learner, config.model, config.replay, config.algorithm.needs_critic)
    keep_to_interface(config.weights.host)
    if config.learner.num_ranks > 1 and "RANK" not in os.environ:
        _launch_ranks(config.learner.num_ranks, name)
    # torch, transformers and DeepSpeed take seconds to import.
    from services.learner.process import run
    from services.learner.ranks import leave

    leave(run(config, name))


def _launch_ranks(num_ranks: int, name: str) -> None:
    """Replace this process by torch's launcher, which starts `rollmesh learner` once for each rank, with RANK set."""
    path = os.environ.get("ROLLMESH_CONFIG")
    if path is None:
        raise ConfigError(
            "learner.num_ranks", f"{num_ranks} needs the mesh file in ROLLMESH_CONFIG", "start it as `rollmesh learner`"
        )
    overrides = [f"--set={override}" for override in json.loads(os.environ.get("ROLLMESH_OVERRIDES", "[]"))]
    # The launcher's own store would listen on every interface. So the launcher gets a file as its store. The file is in
    # memory only and stays open across the exec. The ranks make the store in which they meet themselves.
    file = os.memfd_create("ranks", 0)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    meeting = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint=/proc/self/fd/{file}"]
    ranks = [f"--local-addr={RANKS_HOST}", f"--nproc-per-node={num_ranks}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, *ranks]
    command = ["-m", "rollmesh.cli", "learner", "--config", path, "--name", name, *overrides]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*launcher, *command])
