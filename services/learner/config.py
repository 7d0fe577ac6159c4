"""The learner's section of the mesh file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rollmesh.config.section import Section
from rollmesh.config.shared import Attention, ModelSection, NonNegativeInt, PositiveFloat, PositiveInt, TrainingSection
from rollmesh.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """Settings of AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    """The learning rate after warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """The decay rates of AdamW's averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """The number that AdamW adds to the denominator of an update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The weight decay of matrices. Biases and norms have none."""
    warmup_steps: NonNegativeInt = 0
    """The number of optimiser steps in which the learning rate grows linearly to `lr`. A batch has
    learner.steps_per_batch × learner.epochs_per_batch optimiser steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after warm-up. constant: the rate stays `lr`. linear and cosine: the rate falls from `lr` to
    min_lr_ratio × lr, which it reaches at the last optimiser step of the run."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The last learning rate as a share of `lr`; without effect on the schedule constant."""
    max_grad_norm: PositiveFloat = 1.0
    """The largest norm of the gradient; a larger gradient is scaled down to this norm."""


class CriticOptimizerSection(OptimizerSection):
    """Settings of the critic's optimiser: the settings of the policy's optimiser, with a larger learning rate."""

    lr: PositiveFloat = 9e-6
    """The learning rate after warm-up."""


class CriticSection(Section):
    """Settings of the critic, the value model that the advantage estimator gae needs."""

    model_path: Path | None = None
    """The folder of a reward model or of a causal language model, from which the critic starts. null starts from the
    policy's model."""
    optimizer: CriticOptimizerSection = CriticOptimizerSection()
    """Settings of the critic's optimiser."""


class CheckpointSection(Section):
    """Settings of checkpoints."""

    every_steps: PositiveInt | None = 50
    """The number of steps between two checkpoints. With null the number of steps makes no checkpoint due. Trained
    groups stay in Redis until a checkpoint covers them. The last step always has a checkpoint. Where every_minutes is
    null too, the last step's is the only one, and groups leave Redis as soon as they are trained."""
    every_minutes: PositiveFloat | None = 30.0
    """The minutes from the beginning of one checkpoint until the next is due, at the end of a step. With null the time
    makes no checkpoint due."""
    max_kept: PositiveInt = 2
    """The number of newest checkpoints to keep, with their exports. Older checkpoints and exports are deleted."""
    max_bytes: PositiveInt | None = None
    """The most bytes that all checkpoints and their exports may take on disk. The oldest are deleted first, and the
    best after all others. The newest always stays. A checkpoint that is being written does not count. null: no
    limit."""
    keep_best: str | None = None
    """The metric whose best checkpoint stays besides the newest max_kept: a name in evaluations.jsonl, such as
    pass_at_1. Checkpoints at steps that were evaluated compete, and of equal ones the latest wins. null keeps none."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Whether the highest or the lowest value of keep_best is the best."""
    should_export: bool = True
    """Write a Hugging Face folder of the policy with each checkpoint."""

    @property
    def is_only_last(self) -> bool:
        """Whether the last step's checkpoint is the only one."""
        return self.every_steps is None and self.every_minutes is None


class LearnerSection(Section):
    """Settings of the learner."""

    address: str = "127.0.0.1:0"
    """The host:port of the learner's own server, which answers for health and status. Port 0 takes a free port."""
    num_ranks: PositiveInt = 1
    """The number of data-parallel processes."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """The stage of DeepSpeed's ZeRO. The ranks divide among them nothing (0), the optimiser's state (1), also the
    gradients (2), also the parameters (3). With bfloat16, 0 means 1."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The dtype of the parameters in forward and backward passes. The optimiser's parameters are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device of the learner. auto: CUDA where there is a CUDA device, else the CPU."""
    attention: Attention = "auto"
    """The attention implementation (transformers' attn_implementation). "auto" takes the implementation that is right
    for the model: sdpa, or eager where sdpa leaves something out (a soft cap, attention sinks). An implementation that
    changes the outputs of the model is refused."""
    tokens_per_micro_batch: PositiveInt = 16384
    """The most tokens of one forward and backward pass of a rank."""
    packing: bool = True
    """Let sequences share rows, where the loaded model keeps them apart. False gives each sequence a row of its own,
    padded to the longest sequence."""
    parity: Literal["error", "warn", "off"] = "error"
    """What happens where the learner and the engine compute different log-probabilities with the same weights. error:
    the run ends. warn: the log says so. off: nothing is compared. The first batch of a process decides; some samples of
    later batches are compared for a metric. Nothing is compared where sampling.top_p or top_k changes the engine's
    distribution."""
    parity_tolerance: PositiveFloat | None = None
    """The difference of log-probabilities that `parity` allows. Where learner and engine both compute in float32, the
    largest difference of a token counts, and null is 0.001. Elsewhere the mean difference counts, and null is 0.1."""
    steps_per_batch: PositiveInt = 1
    """The number of parts into which a batch is cut. Each part is one optimiser step in each pass over the batch."""
    epochs_per_batch: PositiveInt = 1
    """The number of passes over a batch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, more time."""
    optimizer: OptimizerSection = OptimizerSection()
    """Settings of the policy's optimiser."""
    critic: CriticSection = CriticSection()
    """Settings of the critic."""
    ema_beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """β of a moving average of the policy, θ_avg ← β θ_avg + (1 - β) θ at each optimiser step. The average is exported
    beside the policy. With null there is no average."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Settings of checkpoints and exports."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Settings of DeepSpeed that replace the settings that RollMesh derives."""
    num_threads: PositiveInt = 1
    """The number of threads of each rank on CPU."""
    batch_timeout_s: PositiveFloat = 900.0
    """Seconds that Redis may be out of reach before the learner gives up. The wait for a batch may take longer: the
    coordinator decides whether the run stands still (coordinator.stall_timeout_s)."""
    silent_work_timeout_s: PositiveFloat = 1800.0
    """Seconds that loading the model, writing a checkpoint or writing an export may show no sign of moving before the
    run fails. Files that grow are a sign."""
    should_record_batches: bool = False
    """Write every batch to the folder `batches/` in the run folder, so that `rollmesh replay` can repeat the run. A
    batch takes 8 bytes per generated token, 4 more with a reference, and 4 per prompt token; no file is removed."""

    @property
    def updates_per_batch(self) -> int:
        """The number of optimiser steps on each batch."""
        return self.steps_per_batch * self.epochs_per_batch

    def check_sample_fits(self, model: ModelSection) -> None:
        """Raise ConfigError if the longest sample is larger than a micro-batch."""
        if model.max_length > self.tokens_per_micro_batch:
            raise ConfigError(
                "learner.tokens_per_micro_batch",
                f"{self.tokens_per_micro_batch} cannot hold one sample of model.max_length {model.max_length}",
                "raise it to at least that",
            )

    def check_batch_divides(self, training: TrainingSection) -> None:
        """Raise ConfigError if a batch cannot be dealt to the ranks, or cannot be cut into the optimiser steps."""
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
