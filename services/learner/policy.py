"""The policy network: a Hugging Face causal language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollmesh.algorithms.logprobs import token_logprobs


class PolicyModel(nn.Module):
    """Wraps a causal language model so that logits exist only where they are needed.

    Prompts and environment tokens are often most of a batch, and logits are the largest tensor of a pass. A hook in
    front of the output embeddings keeps the hidden states of the predicting positions alone; the model's own forward
    goes on from there, so whatever it does to its logits (scaling, capping) is done here as well.

    Args:
        causal_lm: a model with output embeddings.
        temperature: of the sampling; log-probabilities are those of ``softmax(logits / temperature)``.
    """

    def __init__(self, causal_lm: Any, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self._predictors: Tensor | None = None
        causal_lm.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[rows, L, H] to [1, N, H] at the predicting positions."""
        if self._predictors is None:
            return inputs
        return (inputs[0].flatten(0, 1)[self._predictors][None], *inputs[1:])

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, predictors: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the targets.

        Args:
            input_ids: int64 [rows, L].
            position_ids: int64 [rows, L], restarting with every packed sequence.
            predictors: int64 [N], flat index of the position that predicts each target.
            targets: int64 [N].

        Returns:
            Log-probabilities float32 [N], differentiable; entropies float32 [N], without gradient.
        """
        self._predictors = predictors
        try:
            output = self.causal_lm(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        finally:
            self._predictors = None
        return token_logprobs(output.logits[0], targets, self.temperature)


def load_causal_lm(path: Path, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> Any:
    """Load a model from a local folder, with every dropout off.

    Dropout would make the policy that trains another than the policy that was sampled.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
