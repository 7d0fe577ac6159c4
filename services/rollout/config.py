"""The rollout worker's section."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt


class EngineSection(Section):
    """vLLM's settings."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_num_seqs: PositiveInt = 64
    """Samples that generate at the same time."""
    tensor_parallel_size: PositiveInt = 1
    enforce_eager: bool = False
    """No graph capture: starts faster, generates slower on GPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    cpu_kv_cache_gib: PositiveInt = 1
    """Size of the KV cache where vLLM runs on CPU."""
    enable_prefix_caching: bool = True
    """Cached prefixes are salted with the policy version."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of vLLM's AsyncEngineArgs."""


class RolloutSection(Section):
    address: str = "127.0.0.1:0"
    """host:port the worker listens on; port 0 takes a free one, which the worker registers."""
    num_workers: PositiveInt = 1
    """Workers that `rollmesh up` starts."""
    engine: EngineSection = EngineSection()
    max_open_groups: PositiveInt | None = None
    """Groups a worker holds at the same time. Default: enough to fill the engine and have as many samples again
    waiting or being scored."""
    kv: Literal["keep", "recompute", "drain"] = "keep"
    """What happens to requests in flight when a version is committed: go on with their KV cache, go on with it
    computed anew, or be finished before."""
    scoring_timeout_s: PositiveFloat = 120.0
    """Time for the reward of one sample, retries included."""
    scoring_attempts: PositiveInt = 3
    """Tries to score one sample before its group fails."""
    start_timeout_s: PositiveFloat = 600.0
    """Time the engine may take to start."""

    def open_groups(self, samples_per_prompt: int) -> int:
        """Groups that one worker holds at the same time, with the default of `max_open_groups` worked out.

        64 sequences and groups of 8 give 16: eight groups generate while eight wait or are being scored.
        """
        if self.max_open_groups is not None:
            return self.max_open_groups
        return max(1, math.ceil(2 * self.engine.max_num_seqs / samples_per_prompt))
