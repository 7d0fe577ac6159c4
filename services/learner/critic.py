"""The critic: the backbone of a language model with a value head, trained beside the policy.

The critic starts from a reward model, whose head is kept, or from a causal language model, whose head is replaced by a
new head. Policy and critic read the same micro-batches. The value of a generated token is the value of the state before
the token, at the position that predicts the token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rollmesh.algorithms.losses.value import clipped_value_loss
from rollmesh.algorithms.statistics import residual_sums
from rollmesh.config.shared import ModelSection
from rollmesh.models.loading import ModelSource
from rollmesh.models.values import ValueModel, load_value_model
from services.learner.batching import MicroBatch
from services.learner.config import LearnerSection
from services.learner.engine import TrainingEngine
from services.learner.metrics import NUM_CRITIC_SUMS
from services.learner.ranks import Ranks


class CriticEngine:
    """The critic in training on one rank.

    Args:
        model: the model that `load_critic` returned.
        section: the learner's settings.
        value_clip: how far a value may move from its old value before its loss stops falling.
        ranks: the process group, already started.
    """

    def __init__(self, model: ValueModel, section: LearnerSection, value_clip: float, ranks: Ranks) -> None:
        self._value_clip = value_clip
        self.engine = TrainingEngine(model, section.critic.optimizer, section, ranks)

    def train(
        self, micro_batches: Iterable[MicroBatch], num_passes: int, num_tokens: float, lr: float
    ) -> tuple[Tensor, float]:
        """Make one optimiser step. Collective.

        Args:
            micro_batches: ``num_passes`` micro-batches, whose columns have the old values and the returns.
            num_passes: forward and backward passes, the same number on every rank.
            num_tokens: generated tokens of the step, over all ranks.
            lr: learning rate of this step.

        Returns:
            This rank's sums, float64 [NUM_CRITIC_SUMS] on the device; and the norm of the gradient over all ranks,
            before clipping.

        Raises:
            RollMeshError: the gradient is not finite.
        """

        def loss(outputs: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, Tensor]:
            return value_loss(outputs[0], batch, num_tokens, self._value_clip)

        return self.engine.train(micro_batches, num_passes, loss, NUM_CRITIC_SUMS, lr)

    def values(self, batch: MicroBatch) -> Tensor:
        """Return the values of a micro-batch, float32 [N], without gradient. Collective at stage 3."""
        return self.engine.outputs(batch)[0]


def value_loss(values: Tensor, batch: MicroBatch, num_tokens: float, clip: float) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's share of the critic's loss: the mean of `clipped_value_loss` over the step's tokens.

    Args:
        values: float32 [N], values of the critic in training; differentiable.
        batch: the micro-batch of these N tokens.
        num_tokens: generated tokens of the whole step, over all ranks.
        clip: how far a value may move from its old value before its loss stops falling.

    Returns:
        The share, a scalar; the shares of all micro-batches and ranks add up to the loss. And float64
        [NUM_CRITIC_SUMS], without gradient: the share, the sum of the values, and `residual_sums`.
    """
    old, returns = batch.columns.values, batch.columns.returns
    assert old is not None
    assert returns is not None
    loss = clipped_value_loss(values, old, returns, clip).sum() / num_tokens
    totals = torch.stack([loss.detach().double(), values.detach().sum(dtype=torch.float64)])
    return loss, torch.cat([totals, residual_sums(values, returns)])


def load_critic(section: LearnerSection, policy: ModelSection, seed: int, device: torch.device) -> ValueModel:
    """Load the model that the critic starts from: its own folder, or the policy's.

    Args:
        section: the learner's settings.
        policy: the settings of the policy model; its folder serves a critic without a folder of its own.
        seed: seed of a new value head.
        device: the device on which the critic will compute. The model is loaded into main memory.

    Raises:
        ConfigError: the folder holds no model that a critic can start from.
    """
    source = ModelSource(
        path=section.critic.model_path or policy.path,
        dtype=section.dtype,
        attention=section.attention,
        device=device,
        trust_remote_code=policy.trust_remote_code,
        place="learner.critic.model_path",
        attention_place="learner.attention",
    )
    model = load_value_model(source, seed)
    if section.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
