"""The learner's section, and the objective."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt


class OptimizerSection(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to biases and norms."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up, over training.steps, down to min_lr_ratio × lr."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_grad_norm: PositiveFloat = 1.0


class CheckpointSection(Section):
    every_steps: PositiveInt | None = 50
    """Also after the last step; none writes that one alone, and trained groups stay in Redis until then."""
    max_kept: PositiveInt = 2
    should_export: bool = True
    """Write a Hugging Face folder beside each checkpoint."""


class LearnerSection(Section):
    address: str = "127.0.0.1:0"
    """host:port of the learner's own server (health and status); port 0 takes a free one."""
    num_ranks: PositiveInt = 1
    """Data-parallel processes."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the parameters in forward and backward; the optimiser's are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: str = "sdpa"
    """transformers' attn_implementation."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens that one rank packs into one forward and backward pass."""
    gradient_checkpointing: bool = False
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Laid over the DeepSpeed configuration that RollMesh derives."""
    num_threads: PositiveInt = 1
    """Threads of each rank on CPU."""
    batch_timeout_s: PositiveFloat = 900.0
    """How long to wait for a batch before the run fails."""
    should_record_batches: bool = False
    """Write every batch to the run folder (`batches/`), so that a step can be repeated and studied."""


class KLSection(Section):
    """Penalty for leaving the reference policy, as a term of the loss."""

    coef: Annotated[float, Field(ge=0)] = 0.0
    """0 runs without a reference service."""
    estimator: Literal["k1", "k2", "k3"] = "k3"


class AlgorithmSection(Section):
    """GRPO (https://arxiv.org/abs/2402.03300) with the clipped surrogate of PPO."""

    type: Literal["grpo"] = "grpo"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    """Upper clip distance; larger than the lower one as in DAPO (https://arxiv.org/abs/2503.14476)."""
    denominator: Literal["auto", "behaviour", "recomputed"] = "auto"
    """What the ratio is taken against: the recorded behaviour policy, or the policy that the learner recomputes at the
    start of the batch, with truncated importance weights. `auto` is behaviour where max_staleness > 0."""
    importance_cap: PositiveFloat = 2.0
    """Upper end of the truncated importance weights; only with `recomputed`."""
    kl: KLSection = KLSection()
