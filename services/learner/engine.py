"""Models in training under DeepSpeed: passes, optimiser steps, checkpoints, and the weights of the policy by name.

No other module imports DeepSpeed. This module hides four of its properties:

* DeepSpeed averages gradients over the ranks, but the gradient of a step has to be that of the objective's loss,
  whatever the ranks and micro-batches. So the loss is multiplied by the number of ranks. Gradients of several
  micro-batches are added up and not averaged.
* The number of passes changes from step to step. So the boundary of gradient accumulation is set at each pass.
* At stage 0 in float32 DeepSpeed clips the gradient but does not return the norm. So this module does both.
* At stage 0 in bfloat16 DeepSpeed accumulates gradients in bfloat16. So this module uses stage 1, which trains alike,
  with accumulation in float32.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rollmesh.config import merge
from rollmesh.config.shared import ModelSection
from rollmesh.errors import ConfigError, RollMeshError
from rollmesh.models.attention import implementation_of, name_of, settle_attention
from rollmesh.models.loading import ModelSource, load_causal_lm
from rollmesh.models.probe import ModelProbe
from rollmesh.models.rows import Rectangle
from rollmesh.models.values import ValueModel
from rollmesh.types import TensorSpec
from services.learner.batching import MicroBatch
from services.learner.checkpoint_names import CheckpointNames, stored_weights
from services.learner.config import LearnerSection, OptimizerSection
from services.learner.export import Exporter
from services.learner.host_copy import PendingFile, copy_to_host
from services.learner.policy import PolicyModel
from services.learner.ranks import Ranks

if TYPE_CHECKING:
    from services.learner.copying_engine import CopyingCheckpointEngine

LossFunction = Callable[[tuple[Tensor, ...], MicroBatch], tuple[Tensor, Tensor]]
"""Takes the model's outputs and the micro-batch on the device. Returns the micro-batch's share of the loss, a scalar,
and float64 sums for metrics."""


class TrainingEngine:
    """A model in training on one rank. The engines of one process are independent of each other.

    Args:
        model: the model. A call with ``(input_ids, position_ids, predictors, targets, boundaries)`` returns a tuple of
            tensors; the first tensor has one number for each predictor.
        optimizer: the settings of this model's optimiser.
        section: the learner's settings.
        ranks: the process group, already started.

    Attributes:
        count_work: called at each forward pass, and each time that weights are gathered.

    Raises:
        ConfigError: DeepSpeed refuses the settings in `learner.deepspeed`.
    """

    def __init__(
        self, model: PolicyModel | ValueModel, optimizer: OptimizerSection, section: LearnerSection, ranks: Ranks
    ) -> None:
        self._pretrained, self._section = model.pretrained, section
        self._ranks = ranks
        self.count_work: Callable[[], None] = lambda: None
        self._is_partitioned = section.zero_stage == 3
        self._max_grad_norm = optimizer.max_grad_norm
        is_float32 = section.dtype == "float32"
        self._zero_stage = 1 if section.zero_stage == 0 and not is_float32 else section.zero_stage
        settings = merge(self._settings(is_float32), section.deepspeed)
        self._deepspeed = _import_deepspeed(ranks.device)
        model.train()
        if not self._is_partitioned:  # stage 3 moves each parameter after cutting it, so that a large model fits
            model.to(ranks.device)
        try:
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=model, optimizer=_adamw(model, optimizer), config=settings, dist_init_required=False
            )
        except ValueError as error:
            if not section.deepspeed:
                raise
            problem = f"{section.deepspeed} is refused by DeepSpeed ({' '.join(str(error).split()):.300})"
            raise ConfigError("learner.deepspeed", problem, "correct it") from error
        self._engine.checkpoint_engine = self._copying = _copying_engine()
        if self._zero_stage == 0 and ranks.world_size == 1:
            self._engine.enable_backward_allreduce = False  # saves a copy of all gradients, needless for one rank

    def _settings(self, is_float32: bool) -> dict[str, Any]:
        """Return the DeepSpeed configuration.

        The batch sizes of 1 have no effect: the loss is divided by the step's number of tokens already.
        """
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._max_grad_norm if self._zero_stage else 0.0,
            "zero_optimization": {"stage": self._zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }
        if not is_float32:
            settings["bf16"] = {"enabled": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings

    def train(
        self, micro_batches: Iterable[MicroBatch], num_passes: int, loss: LossFunction, num_sums: int, lr: float
    ) -> tuple[Tensor, float]:
        """Make one optimiser step. Collective.

        Args:
            micro_batches: ``num_passes`` micro-batches.
            num_passes: forward and backward passes, the same number on every rank.
            loss: the function to minimise; its shares are added up over micro-batches and ranks.
            num_sums: the number of sums that ``loss`` returns.
            lr: learning rate of this step.

        Returns:
            This rank's sums, float64 [num_sums] on the device; and the norm of the gradient over all ranks, before
            clipping.

        Raises:
            RollMeshError: the gradient is not finite.
        """
        sums = torch.zeros(num_sums, dtype=torch.float64, device=self._ranks.device)
        for number, cpu_batch in enumerate(micro_batches, start=1):
            batch = cpu_batch.to(self._ranks.device)
            self._engine.set_gradient_accumulation_boundary(number == num_passes)
            share, batch_sums = loss(self._forward(batch), batch)
            self._engine.backward(share * self._ranks.world_size)
            sums += batch_sums
        return sums, self._step(lr)

    @torch.no_grad()
    def outputs(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Return the model's outputs for a micro-batch, without gradient. Collective at stage 3."""
        return self._forward(batch.to(self._ranks.device))

    def _forward(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        self.count_work()
        outputs: tuple[Tensor, ...] = self._engine(
            batch.input_ids, batch.position_ids, batch.predictors, batch.targets, batch.boundaries
        )
        return outputs

    def examine(self) -> ModelProbe:
        """Choose the model's attention, and return the probe that tries ways of batching. Collective.

        Raises:
            ConfigError: `learner.attention` names an implementation that is wrong for the model.
        """
        model, section = self._pretrained, self._section

        def make_probe() -> ModelProbe:
            vocabulary = model.config.get_text_config().vocab_size
            return ModelProbe(name_of(model), self._outputs_of, vocabulary, section.dtype, self._ranks.max)

        return settle_attention(
            model, make_probe, section.attention, "learner.attention", should_log=self._ranks.is_first
        )

    @property
    def attention(self) -> str:
        """Return the attention implementation that the model uses."""
        return implementation_of(self._pretrained)

    @torch.no_grad()
    def _outputs_of(self, rectangle: Rectangle, predictors: Tensor, targets: Tensor) -> Tensor:
        """Return the model's first output on the CPU, float32 [N], for the probe."""
        device, boundaries = self._ranks.device, rectangle.boundaries
        tensors = [t.to(device) for t in (rectangle.input_ids, rectangle.position_ids, predictors, targets)]
        output: Tensor = self._engine(*tensors, boundaries and boundaries.to(device))[0]
        return output.float().cpu()

    def _step(self, lr: float) -> float:
        norm = self._clip_and_step(lr)
        # At stages 1 to 3 DeepSpeed skips a step whose gradient is not finite. At stage 3 the norm is then that of the
        # step before.
        if not math.isfinite(norm) or getattr(self._optimizer, "overflow", False):
            raise RollMeshError(
                f"the gradient is not finite (norm {norm}): nothing of this step is published; look at "
                "optimizer/grad_norm and importance/max of the steps before"
            )
        return norm

    def _clip_and_step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._zero_stage:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._max_grad_norm))
        if math.isfinite(norm):
            self._engine.step()
        return norm

    def copy_state(self, folder: Path, tag: str) -> list[PendingFile]:
        """Copy the states of model and optimiser to main memory. Collective.

        Returns:
            This rank's files, which are to be written to ``folder/tag``. DeepSpeed creates the folders at once.
        """
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        return self._copying.take()

    def load(self, folder: Path, tag: str) -> None:
        """Read the files that `copy_state` returned. Collective.

        Raises:
            ConfigError: ``folder/tag`` holds no DeepSpeed checkpoint.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ConfigError(str(folder / tag), "holds no DeepSpeed checkpoint", "name another checkpoint")


class PolicyEngine(TrainingEngine):
    """The policy in training on one rank, with its weights by name.

    Args:
        section: the learner's settings.
        model: the settings of the policy model, with its folder.
        ranks: the process group, already started.
        seed: seed of the weights that the folder lacks.
        temperature: the sampling temperature, by which logits are divided.
        balances_experts: whether the load-balancing loss of the model's routers is computed.

    Raises:
        ConfigError: the model cannot be trained as configured.
    """

    def __init__(
        self,
        section: LearnerSection,
        model: ModelSection,
        ranks: Ranks,
        *,
        seed: int,
        temperature: float,
        balances_experts: bool,
    ) -> None:
        torch.manual_seed(seed)
        causal_lm = load_causal_lm(
            ModelSource(
                path=model.path,
                dtype=section.dtype,
                attention=section.attention,
                device=ranks.device,
                trust_remote_code=model.trust_remote_code,
                place="model.path",
                attention_place="learner.attention",
            )
        )
        if section.gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = PolicyModel(causal_lm, temperature, balances_experts)
        super().__init__(policy, section.optimizer, section, ranks)
        self._causal_lm = causal_lm
        self._exporter = Exporter(causal_lm, model.path)
        self._names = CheckpointNames(causal_lm, self.tensor_specs())

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Return the log-probabilities of a micro-batch, float32 [N], without gradient. Collective at stage 3."""
        return self.outputs(batch)[0]

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of the whole parameters, tied parameters once, then of the buffers that a checkpoint stores.

        The names are those of the model in memory.
        """
        return tuple(
            TensorSpec(
                name,
                str(parameter.dtype).removeprefix("torch."),
                tuple(getattr(parameter, "ds_shape", parameter.shape)),
            )
            for name, parameter in stored_weights(self._causal_lm)
        )

    @contextlib.contextmanager
    def whole(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Yield the whole tensors of these names, valid while the context lasts. Collective at stage 3.

        Args:
            names: names from `tensor_specs`.
        """
        self.count_work()
        parameters = dict(stored_weights(self._causal_lm))
        wanted = {name: parameters[name] for name in names}
        gather: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._is_partitioned:
            gather = self._deepspeed.zero.GatheredParameters(list(wanted.values()))
        with gather:
            yield {name: parameter.detach() for name, parameter in wanted.items()}

    @property
    def checkpoint_specs(self) -> tuple[TensorSpec, ...]:
        """Return the specs of the same weights with the names and shapes of the Hugging Face checkpoint."""
        return self._names.specs

    @contextlib.contextmanager
    def checkpoint_tensors(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Yield the whole tensors of these names, and perhaps more tensors of the same parameters.

        The tensors are valid while the context lasts. Collective at stage 3.

        Args:
            names: names from `checkpoint_specs`.
        """
        with self.whole(self._names.parameters_of(names)) as parameters:
            yield self._names.convert(parameters)

    @property
    def needs_all_ranks(self) -> bool:
        """Return whether `whole` and `checkpoint_tensors` are collectives."""
        return self._is_partitioned and self._ranks.world_size > 1

    def copy_weights(self) -> dict[str, Tensor]:
        """Return a copy of the whole weights in main memory, by the names in `tensor_specs`. Collective at stage 3.

        On ranks other than 0 the dict is empty.
        """
        with self.whole(spec.name for spec in self.tensor_specs()) as tensors:
            return copy_to_host(tensors) if self._ranks.is_first else {}

    def write_pretrained(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a Hugging Face folder of this model with the weights in ``state``. Any thread may call this.

        Args:
            folder: the folder; created if missing.
            state: a tensor for each name in `tensor_specs`.
        """
        self._exporter.write(folder, state)


def _adamw(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Return AdamW without weight decay on biases and norms: the parameters of fewer than two dimensions."""
    trained = [p for p in model.parameters() if p.requires_grad]
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) >= 2 for p in trained]
    groups = [
        {
            "params": [p for p, matrix in zip(trained, is_matrix, strict=True) if matrix],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for p, matrix in zip(trained, is_matrix, strict=True) if not matrix], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for the device, and return the module.

    On CPU, DeepSpeed would compile an operator that Gloo makes needless. This function switches the operator off.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", dist_init_required=False)
    return deepspeed


def _copying_engine() -> CopyingCheckpointEngine:
    """Return a `CopyingCheckpointEngine`. Its module needs DeepSpeed, which is imported late."""
    from services.learner.copying_engine import CopyingCheckpointEngine

    return CopyingCheckpointEngine()
