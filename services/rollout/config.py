"""The rollout worker's section of the mesh file."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt


class EngineSection(Section):
    """Settings of vLLM."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the parameters; auto lets vLLM choose by the model's files."""
    max_num_seqs: PositiveInt = 64
    """The most samples that generate at the same time."""
    tensor_parallel_size: PositiveInt = 1
    """The number of processes that share one copy of the model."""
    enforce_eager: bool = False
    """Switch graph capture off: the engine starts faster, and generates slower on GPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The share of each GPU's memory that vLLM may use; without effect on CPU."""
    cpu_kv_cache_gib: PositiveInt = 1
    """The size of the KV cache in GiB where vLLM runs on CPU; without effect on GPUs."""
    enable_prefix_caching: bool = True
    """Cache prefixes of prompts. The policy version salts the cache, so that no version reads another version's
    entries."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of vLLM's AsyncEngineArgs."""


class RolloutSection(Section):
    """Settings of the rollout workers, which generate samples."""

    address: str = "127.0.0.1:0"
    """The host:port that the worker listens on. Port 0 takes a free port, which the worker registers."""
    num_workers: PositiveInt = 1
    """The number of workers that `rollmesh up` starts."""
    engine: EngineSection = EngineSection()
    """Settings of vLLM, the engine of each worker."""
    max_open_groups: PositiveInt | None = None
    """The most groups that a worker holds at the same time. With null the groups have twice as many samples as the
    engine takes: one half generates while the other half waits or is scored."""
    kv: Literal["keep", "recompute", "drain"] = "keep"
    """What happens to requests in flight when a version is committed. keep: the requests go on with their KV cache.
    recompute: the requests go on, and the engine computes their KV cache anew. drain: the requests finish before the
    commit."""
    scoring_timeout_s: PositiveFloat = 120.0
    """Seconds that scoring one sample may take, retries included."""
    scoring_attempts: PositiveInt = 3
    """The number of tries to score one sample. After the last try the sample's group fails."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that the engine may take to start."""

    def open_groups(self, samples_per_prompt: int) -> int:
        """Return the most groups that one worker holds at the same time.

        Without `max_open_groups`, 64 sequences and groups of 8 give 16: eight groups generate while eight groups wait
        or are scored.
        """
        if self.max_open_groups is not None:
            return self.max_open_groups
        return max(1, math.ceil(2 * self.engine.max_num_seqs / samples_per_prompt))
