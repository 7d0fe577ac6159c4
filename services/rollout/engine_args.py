"""The settings of one engine, and what vLLM is told of them: its arguments and its environment."""

from __future__ import annotations

import os
import resource
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollmesh.config import ModelSection, WeightsSection
from rollmesh.weights.interface import address_towards, keep_to_interface
from services.rollout.config import RolloutSection
from services.rollout.owner import OWNER_VARIABLE
from services.rollout.preflight import num_open_files, refuse_extra

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_WORKER_EXTENSION = "services.rollout.vllm_plugin.MeshWorkerExtension"
_GIB = 1024**3
_SEED_STRIDE = 1_000_003
_LONGEST_SOCKET_FOLDER = 64
_IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its path, because vLLM replaces the short name "uni" on CPU: its own thread binding needs a worker process. We
bind no threads, and one process less starts sooner and leaves a small machine more."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings that one engine starts with.

    Attributes:
        model: the policy's folder and its longest sequence.
        rollout: vLLM's settings and the time that a start may take.
        weights: the interface of the weight transfers and the time that a commit may take.
        seed: of this engine's random numbers. Every worker of a run has another seed.
    """

    model: ModelSection
    rollout: RolloutSection
    weights: WeightsSection
    seed: int


def engine_seed(run_seed: int, worker_index: int) -> int:
    """Return the seed of one worker's engine, e.g. 1_000_045 for worker 1 of a run with the seed 42.

    Args:
        run_seed: `run.seed` of the mesh file.
        worker_index: the position of the worker among the run's workers, from 0.
    """
    return run_seed + _SEED_STRIDE * worker_index


def prepare_environment(start_timeout_s: float, weights_host: str) -> None:
    """Set the environment variables that vLLM reads. Call this before vLLM is imported. Variables that are set stay.

    vLLM's processes are spawned, never forked: a child forked from a process with gRPC in it hangs. They may open as
    many files as the system allows.

    Args:
        start_timeout_s: the time that vLLM's processes may take to start.
        weights_host: the host of the weight transfers; vLLM's processes listen on the interface towards it.

    Raises:
        ConfigError: the system allows a process too few open files.
    """
    defaults = {
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # An idle worker does not notice the end before it is sent a signal, which vLLM does after this time.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
        "VLLM_RPC_BASE_PATH": _socket_folder(),
        "VLLM_ENGINE_READY_TIMEOUT_S": str(round(start_timeout_s)),
        "VLLM_HOST_IP": address_towards(weights_host),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    keep_to_interface(weights_host)
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, num_open_files()), hard))


def _socket_folder() -> str:
    """Where vLLM makes its Unix sockets. Their paths have at most 107 bytes, 37 of which are a name; clusters set
    TMPDIR to folders that leave too few."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER else "/tmp"


def _limit_cpu_threads(num_workers: int) -> None:
    """Share the cores of this machine between its workers and the learner.

    Left alone, vLLM pins each engine to all physical cores but one, counted from the same end: workers on one machine
    would sit on the same cores.
    """
    num_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // (num_workers + 1))))


def engine_args(settings: EngineSettings, model: Path | None = None) -> AsyncEngineArgs:
    """Return vLLM's arguments for one worker.

    Args:
        settings: the engine's settings.
        model: the folder to load; None takes the folder of the settings.

    Raises:
        ConfigError: `rollout.engine.extra` names something that vLLM does not know or the mesh sets itself.
    """
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from services.rollout.vllm_plugin import BACKEND

    engine = settings.rollout.engine
    arguments: dict[str, Any] = {
        "model": str(model or settings.model.path),
        "trust_remote_code": settings.model.trust_remote_code,
        "max_model_len": settings.model.max_length,
        "dtype": engine.dtype,
        "seed": settings.seed,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": _WORKER_EXTENSION,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if current_platform.is_cpu():
        arguments["kv_cache_memory_bytes"] = engine.cpu_kv_cache_gib * _GIB
        if engine.tensor_parallel_size == 1:
            arguments["distributed_executor_backend"] = _IN_PROCESS_EXECUTOR
        _limit_cpu_threads(settings.rollout.num_workers)
    else:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    known = frozenset(field.name for field in fields(AsyncEngineArgs))
    for name in engine.extra:
        refuse_extra(name, known)
    return AsyncEngineArgs(**{**arguments, **engine.extra})
