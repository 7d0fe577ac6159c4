"""The critic: the backbone of a language model with a value head, trained beside the policy.

It starts from a reward model, whose head is kept, or from a causal language model, whose head is replaced by a fresh
one. It sees the same micro-batches as the policy, and values the state before each generated token: the position that
predicts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from rollmesh.algorithms.losses.value import clipped_value_loss
from rollmesh.algorithms.statistics import residual_sums
from rollmesh.errors import ConfigError
from services.config import MeshConfig
from services.learner.batching import MicroBatch
from services.learner.engine import DTYPES, TrainingEngine
from services.learner.metrics import NUM_CRITIC_SUMS
from services.learner.policy import load_pretrained
from services.learner.ranks import Ranks

_PLACE = "learner.critic.model_path"
_REWARD_MODEL_SUFFIXES = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")


class ValueHead(nn.Linear):
    """One number for each hidden state, in float32 whatever the dtype of the weights: values differ by little."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] to float32 [N]."""
        return functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


class ValueModel(nn.Module):
    """Values at the predicting positions.

    Args:
        backbone: a model that gives `last_hidden_state`.
        head: its value head.
    """

    def __init__(self, backbone: Any, head: ValueHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, input_ids: Tensor, position_ids: Tensor, predictors: Tensor, _targets: Tensor) -> tuple[Tensor]:
        """Values float32 [N], differentiable; the arguments are those of `PolicyModel.forward`."""
        output = self.backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return (self.head(output.last_hidden_state.flatten(0, 1)[predictors]),)


class CriticEngine:
    """The critic in training on one rank.

    Args:
        config: the mesh's configuration.
        ranks: the process group, already started.

    Raises:
        ConfigError: the folder holds no model that a critic can start from.
    """

    def __init__(self, config: MeshConfig, ranks: Ranks) -> None:
        self._value_clip = config.algorithm.value_clip
        self.engine = TrainingEngine(load_value_model(config), config.learner.critic.optimizer, config, ranks)

    def train(
        self, micro_batches: Iterable[MicroBatch], num_passes: int, num_tokens: float, lr: float
    ) -> tuple[Tensor, float]:
        """One optimiser step. Collective.

        Args:
            micro_batches: as for `TrainingEngine.train`; their columns hold the old values and the returns.
            num_passes: forward and backward passes.
            num_tokens: generated tokens of the step, over all ranks.
            lr: learning rate of this step.

        Returns:
            This rank's sums float64 [NUM_CRITIC_SUMS] on the device, and the norm of the gradient over all ranks,
            before clipping.
        """

        def loss(outputs: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, Tensor]:
            return value_loss(outputs[0], batch, num_tokens, self._value_clip)

        return self.engine.train(micro_batches, num_passes, loss, NUM_CRITIC_SUMS, lr)

    def values(self, batch: MicroBatch) -> Tensor:
        """Values float32 [N] of a micro-batch, without gradient. Collective at stage 3."""
        return self.engine.outputs(batch)[0]


def value_loss(values: Tensor, batch: MicroBatch, num_tokens: float, clip: float) -> tuple[Tensor, Tensor]:
    """The share of a micro-batch in the mean over the step's tokens of `clipped_value_loss`.

    Args:
        values: float32 [N], of the critic in training; differentiable.
        batch: the micro-batch of these N tokens.
        num_tokens: generated tokens of the whole step, over all ranks.
        clip: how far a value may move from the old one.

    Returns:
        The loss, a scalar to be summed over micro-batches and ranks; float64 [NUM_CRITIC_SUMS] without gradient: the
        loss, the values, and `residual_sums`.
    """
    old, returns = batch.columns.values, batch.columns.returns
    assert old is not None
    assert returns is not None
    loss = clipped_value_loss(values, old, returns, clip).sum() / num_tokens
    totals = torch.stack([loss.detach().double(), values.detach().sum(dtype=torch.float64)])
    return loss, torch.cat([totals, residual_sums(values, returns)])


def load_value_model(config: MeshConfig) -> ValueModel:
    """Load the backbone, and the head of a reward model or a fresh one.

    Raises:
        ConfigError: there is no such folder, it lacks weights, or its head does not give one number.
    """
    from transformers import AutoModel

    section, path = config.learner, config.learner.critic.model_path or config.model.path
    if not path.is_dir():
        raise ConfigError(_PLACE, f"{str(path)!r} is not a folder", "name one with a reward or language model")
    dtype = DTYPES[section.dtype]
    backbone = load_pretrained(AutoModel, path, dtype, section.attention, config.model.trust_remote_code, _PLACE)
    if section.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hidden_size = backbone.config.get_text_config().hidden_size
    head = ValueHead(hidden_size)
    stored = _stored_head(path, backbone.config)
    with torch.no_grad():
        if stored is None:
            # The same on every rank, whatever else has drawn; the scale is that of OpenRLHF.
            generator = torch.Generator().manual_seed(config.run.seed)
            head.weight.normal_(0.0, 1 / (hidden_size + 1), generator=generator)
        elif stored.shape == head.weight.shape:
            head.weight.copy_(stored)
        else:
            problem = f"the head of {path} has shape {tuple(stored.shape)}, not {tuple(head.weight.shape)}"
            raise ConfigError(_PLACE, problem, "name a reward model that gives one number")
    return ValueModel(backbone, head.to(dtype))


def _stored_head(path: Path, config: Any) -> Tensor | None:
    """The weight of a reward model's head; None for a causal language model.

    Its name is "score" as in transformers, or what the folder's config.json calls `value_head_prefix`.
    """
    name = f"{getattr(config, 'value_head_prefix', 'score')}.weight"
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - no mapping
                weight: Tensor = tensors.get_tensor(name)
                return weight
    is_reward_model = any(each.endswith(_REWARD_MODEL_SUFFIXES) for each in config.architectures or [])
    if is_reward_model or hasattr(config, "value_head_prefix"):
        problem = f"{path} is a reward model without a {name} in its safetensors files"
        raise ConfigError(_PLACE, problem, "name a complete reward model, or a causal language model")
    return None
