"""The policy network: a Hugging Face causal language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollmesh.algorithms.logprobs import token_logprobs
from rollmesh.errors import ConfigError


class PolicyModel(nn.Module):
    """Wraps a causal language model so that logits exist only where they are needed.

    Prompts and environment tokens are often most of a batch, and logits are the largest tensor of a pass. A hook in
    front of the output embeddings keeps the hidden states of the predicting positions alone; the model's own forward
    goes on from there, so whatever it does to its logits (scaling, capping) is done here as well.

    Args:
        causal_lm: a model with output embeddings.
        temperature: of the sampling; log-probabilities are those of ``softmax(logits / temperature)``.
        balances_experts: compute the load-balancing loss of the model's routers.

    Raises:
        ConfigError: the load-balancing loss of a model without routers is asked for.
    """

    def __init__(self, causal_lm: Any, temperature: float, balances_experts: bool = False) -> None:
        super().__init__()
        if balances_experts and "output_router_logits" not in inspect.signature(causal_lm.forward).parameters:
            problem = f"is greater than 0 but {type(causal_lm).__name__} has no routers to balance"
            raise ConfigError("algorithm.aux_loss_coef", problem, "set it to 0")
        self.causal_lm = causal_lm
        self.temperature = temperature
        self._options = {"output_router_logits": True} if balances_experts else {}
        self._predictors: Tensor | None = None
        causal_lm.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[rows, L, H] to [1, N, H] at the predicting positions."""
        if self._predictors is None:
            return inputs
        return (inputs[0].flatten(0, 1)[self._predictors][None], *inputs[1:])

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, predictors: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies of the targets, and how unevenly the experts are used.

        Args:
            input_ids: int64 [rows, L].
            position_ids: int64 [rows, L], restarting with every packed sequence.
            predictors: int64 [N], flat index of the position that predicts each target.
            targets: int64 [N].

        Returns:
            Log-probabilities float32 [N]; entropies float32 [N]; the load-balancing loss as the model defines it, over
            all rows × L positions, a scalar, 0 where it is not asked for. All are differentiable.
        """
        self._predictors = predictors
        try:
            output = self.causal_lm(input_ids=input_ids, position_ids=position_ids, use_cache=False, **self._options)
        finally:
            self._predictors = None
        logprobs, entropies = token_logprobs(output.logits[0], targets, self.temperature)
        return logprobs, entropies, output.aux_loss if self._options else logprobs.new_zeros(())


def load_causal_lm(path: Path, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> Any:
    """Load a causal language model from a local folder; see `load_pretrained`."""
    from transformers import AutoModelForCausalLM

    return load_pretrained(AutoModelForCausalLM, path, dtype, attention, trust_remote_code, "model.path")


def load_pretrained(
    auto_class: Any, path: Path, dtype: torch.dtype, attention: str, trust_remote_code: bool, place: str
) -> Any:
    """Load a model from a local folder, with every dropout and the routers' noise off.

    They would make the policy that trains another than the policy that was sampled.

    Args:
        auto_class: of transformers.
        path: the folder.
        dtype: of the parameters.
        attention: transformers' attn_implementation.
        trust_remote_code: run Python code that lies in the folder.
        place: the configuration path that named the folder, for errors.

    Raises:
        ConfigError: the folder lacks some of the model's weights.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith(("_pdrop", "_jitter_noise"))):
            setattr(config, name, 0.0)
    model, info = auto_class.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random numbers
        problem = f"{path} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]})"
        raise ConfigError(place, problem, "name a folder with all of them")
    return model
