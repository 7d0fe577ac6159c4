"""The learner's section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import Attention, ModelSection, NonNegativeInt, PositiveFloat, PositiveInt, TrainingSection
from rollmesh.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to biases and norms."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps; a batch has learner.steps_per_batch × epochs_per_batch of them."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up, over all optimiser steps of the run, down to min_lr_ratio × lr."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_grad_norm: PositiveFloat = 1.0


class CriticOptimizerSection(OptimizerSection):
    """The same for the critic, which learns faster."""

    lr: PositiveFloat = 9e-6


class CriticSection(Section):
    """The value model, where the advantage estimator needs one."""

    model_path: Path | None = None
    """Folder of a reward model or a causal language model; none starts from the policy's."""
    optimizer: CriticOptimizerSection = CriticOptimizerSection()


class CheckpointSection(Section):
    every_steps: PositiveInt | None = 50
    """Also after the last step; none writes that one alone. Trained groups stay in Redis until a
    checkpoint covers them; with none they leave it at once."""
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
    attention: Attention = "auto"
    """transformers' attn_implementation. "auto" takes what is right for the model: sdpa, or eager where sdpa leaves
    something out (a soft cap, attention sinks). A choice that changes the outputs of the model is refused."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens that one rank packs into one forward and backward pass."""
    packing: bool = True
    """Let sequences share rows, if the model is found to keep them apart; off gives each its own, padded to the
    longest."""
    parity: Literal["error", "warn", "off"] = "error"
    """What to do where the learner computes other log-probabilities than the engine did with the same weights. It is
    tried on the first batch of a process; some samples of later batches are compared as a metric. Not tried where
    sampling.top_p or top_k changes the engine's distribution."""
    parity_tolerance: PositiveFloat | None = None
    """Difference of log-probabilities that is allowed. Of the largest one where learner and engine compute in float32,
    and then 0.001 by default; elsewhere of their mean, and then 0.1."""
    steps_per_batch: PositiveInt = 1
    """Optimiser steps in one pass over a batch: it is cut into so many parts."""
    epochs_per_batch: PositiveInt = 1
    """Passes over a batch."""
    gradient_checkpointing: bool = False
    optimizer: OptimizerSection = OptimizerSection()
    critic: CriticSection = CriticSection()
    ema_beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the policy, θ_avg ← β θ_avg + (1 - β) θ at each optimiser step, and export it beside the
    policy; none keeps none."""
    checkpoint: CheckpointSection = CheckpointSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Laid over the DeepSpeed configuration that RollMesh derives."""
    num_threads: PositiveInt = 1
    """Threads of each rank on CPU."""
    batch_timeout_s: PositiveFloat = 900.0
    """Seconds that Redis may be away before the learner gives up. A batch may take longer: whether the run stands still
    is the coordinator's to say (coordinator.stall_timeout_s)."""
    silent_work_timeout_s: PositiveFloat = 1800.0
    """Seconds that loading the model, a checkpoint or an export may go on without a sign of moving before the run
    fails. Files that grow are a sign."""
    should_record_batches: bool = False
    """Write every batch to the run folder (`batches/`), so that a step can be repeated and studied."""

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps on each batch."""
        return self.steps_per_batch * self.epochs_per_batch

    def check_sample_fits(self, model: ModelSection) -> None:
        """Raises ConfigError if the longest sample is larger than a micro-batch."""
        if model.max_length > self.tokens_per_micro_batch:
            raise ConfigError(
                "learner.tokens_per_micro_batch",
                f"{self.tokens_per_micro_batch} cannot hold one sample of model.max_length {model.max_length}",
                "raise it to at least that",
            )

    def check_batch_divides(self, training: TrainingSection) -> None:
        """Raises ConfigError if a batch cannot be dealt to the ranks, or cut into the optimiser steps."""
        batch = training.prompts_per_step
        if batch % self.num_ranks:
            raise ConfigError(
                "training.prompts_per_step",
                f"{batch} is not divisible by learner.num_ranks {self.num_ranks}",
                f"use a multiple of {self.num_ranks}",
            )
        if self.steps_per_batch > batch:
            raise ConfigError(
                "learner.steps_per_batch",
                f"{self.steps_per_batch} optimiser steps need more groups than training.prompts_per_step {batch}",
                f"use at most {batch}",
            )
