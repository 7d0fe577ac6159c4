"""Value models: the backbone of a language model, and a head that gives one number for each hidden state."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from rollmesh.errors import ConfigError
from rollmesh.models.loading import ModelSource, load_pretrained
from rollmesh.models.rows import AcceptedInputs, Boundaries

_REWARD_MODEL_SUFFIXES = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")


class ValueHead(nn.Linear):
    """A head that gives one number for each hidden state. It computes in float32, because values differ by little."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 [N] from hidden states [N, H]."""
        return functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A model that gives values at the predicting positions.

    Args:
        backbone: a model that gives `last_hidden_state`.
        head: its value head.
    """

    def __init__(self, backbone: Any, head: ValueHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._accepted = AcceptedInputs(backbone)

    @property
    def pretrained(self) -> Any:
        """The transformers model inside."""
        return self.backbone

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        _targets: Tensor,
        boundaries: Boundaries | None = None,
    ) -> tuple[Tensor]:
        """Return values float32 [N], differentiable.

        Args:
            input_ids: int64 [rows, L].
            position_ids: int64 [rows, L], restarting with every packed sequence.
            predictors: int64 [N], flat index of the position that predicts each generated token.
            boundaries: the boundaries of the sequences in the only row; None leaves them out.
        """
        more = self._accepted(position_ids, boundaries)
        output = self.backbone(input_ids=input_ids, use_cache=False, **more)
        return (self.head(output.last_hidden_state.flatten(0, 1)[predictors]),)


def load_value_model(source: ModelSource, seed: int) -> ValueModel:
    """Load the backbone, and a reward model's head or a new head.

    Args:
        source: the folder of a reward model, whose head is kept, or of a causal language model, which gets a new head.
        seed: seed of the weights of a new head.

    Raises:
        ConfigError: there is no such folder, it lacks weights, or its head does not give one number.
    """
    from transformers import AutoModel

    if not source.path.is_dir():
        problem = f"{str(source.path)!r} is not a folder"
        raise ConfigError(source.place, problem, "name one with a reward or language model")
    backbone = load_pretrained(AutoModel, source)
    hidden_size = backbone.config.get_text_config().hidden_size
    head = ValueHead(hidden_size)
    stored = _stored_head(source, backbone.config)
    with torch.no_grad():
        if stored is None:
            # A generator of its own gives every rank the same weights; the scale is that of OpenRLHF.
            head.weight.normal_(0.0, 1 / (hidden_size + 1), generator=torch.Generator().manual_seed(seed))
        elif stored.shape == head.weight.shape:
            head.weight.copy_(stored)
        else:
            problem = f"the head of {source.path} has shape {tuple(stored.shape)}, not {tuple(head.weight.shape)}"
            raise ConfigError(source.place, problem, "name a reward model that gives one number")
    return ValueModel(backbone, head.to(backbone.dtype))


def _stored_head(source: ModelSource, config: Any) -> Tensor | None:
    """Return the weight of a reward model's head; None for a causal language model.

    The head's name is "score" as in transformers, or the `value_head_prefix` of the folder's config.json.
    """
    name = f"{getattr(config, 'value_head_prefix', 'score')}.weight"
    for file in sorted(source.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - no mapping
                weight: Tensor = tensors.get_tensor(name)
                return weight
    is_reward_model = any(each.endswith(_REWARD_MODEL_SUFFIXES) for each in config.architectures or [])
    if is_reward_model or hasattr(config, "value_head_prefix"):
        problem = f"{source.path} is a reward model without a {name} in its safetensors files"
        raise ConfigError(source.place, problem, "name a complete reward model, or a causal language model")
    return None
