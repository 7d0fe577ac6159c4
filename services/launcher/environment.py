"""The environment variables that the services get from the launcher.

A service gets every variable of the launcher, with these exceptions:

* The variables of a distributed job around the launcher (torchrun, accelerate, MPI, a PyTorchJob pod) are left out.
  Otherwise the learner would take the ranks of the other job for its own, and would wait for these ranks.
* The switches of the Python interpreter that change the behaviour of our code are left out. ``PYTHONOPTIMIZE`` drops
  assertions; ``PYTHONWARNINGS=error`` makes the imports of libraries fail.
* The encoding of text is UTF-8 in every locale.
* Python never looks up modules in the working directory. Services start with ``-P``. The empty entries of
  ``PYTHONPATH``, which mean the working directory, are dropped. A user's own modules are loaded by their paths.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

JOB_VARIABLES = frozenset(
    {
        *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "CROSS_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "CROSS_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT"),
    }
)
"""Variables that number the processes of a distributed job. torch's launcher, DeepSpeed and vLLM read them."""
JOB_PREFIXES = ("TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_", "OMPI_", "PMI_", "PMIX_", "MV2_COMM_", "VLLM_DP_")
"""The first letters of further such variables: of torchrun, accelerate, MPI's launchers, and data-parallel vLLM."""
PYTHON_SWITCHES = frozenset({"PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT", "PYTHONIOENCODING", "PYTHONSTARTUP"})
"""Variables that change the behaviour of the Python interpreter."""


def job_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names in ``environment`` that belong to a distributed job around this process, sorted."""
    return sorted(name for name in environment if name in JOB_VARIABLES or name.startswith(JOB_PREFIXES))


def service_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a service, made from the launcher's ``environment`` by the rules above."""
    left_out = PYTHON_SWITCHES.union(job_variables(environment))
    passed = {name: value for name, value in environment.items() if name not in left_out}
    folders = [entry for entry in passed.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    if folders:
        passed["PYTHONPATH"] = os.pathsep.join(folders)
    return {**passed, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
