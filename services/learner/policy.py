"""The policy network: a Hugging Face causal language model that returns log-probabilities instead of logits."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from rollmesh.errors import ConfigError
from rollmesh.models.logprobs import token_logprobs
from rollmesh.models.rows import AcceptedInputs, Boundaries
from rollmesh.models.wanted import WantedLogits


class PolicyModel(nn.Module):
    """A causal language model that gives log-probabilities of target tokens, and entropies at their predictors.

    Args:
        causal_lm: a model with output embeddings.
        temperature: the sampling temperature; probabilities are ``softmax(logits / temperature)``.
        balances_experts: whether to compute the load-balancing loss of the model's routers.

    Raises:
        ConfigError: ``balances_experts`` is true, but the model has no routers.
    """

    def __init__(self, causal_lm: Any, temperature: float, balances_experts: bool = False) -> None:
        super().__init__()
        if balances_experts and "output_router_logits" not in inspect.signature(causal_lm.forward).parameters:
            problem = f"is greater than 0 but {type(causal_lm).__name__} has no routers to balance"
            raise ConfigError("algorithm.aux_loss_coef", problem, "set it to 0")
        self.causal_lm = causal_lm
        self.temperature = temperature
        self._options = {"output_router_logits": True} if balances_experts else {}
        self._logits = WantedLogits(causal_lm)
        self._accepted = AcceptedInputs(causal_lm)

    @property
    def pretrained(self) -> Any:
        """Return the model of transformers inside."""
        return self.causal_lm

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        boundaries: Boundaries | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities and entropies at the targets, and the load-balancing loss.

        Args:
            input_ids: int64 [rows, L].
            position_ids: int64 [rows, L], restarting with every packed sequence.
            predictors: int64 [N], flat index of the position that predicts each target.
            targets: int64 [N], the generated tokens.
            boundaries: the boundaries of the sequences in the only row; None passes no boundaries to the model.

        Returns:
            Log-probabilities, float32 [N]; entropies, float32 [N]; and the load-balancing loss, a scalar, as the model
            defines the loss over all rows × L positions; 0 unless the model balances its experts. All are
            differentiable.
        """
        more = self._accepted(position_ids, boundaries)
        output = self._logits(predictors, input_ids=input_ids, **more, **self._options)
        logprobs, entropies = token_logprobs(output.logits[0], targets, self.temperature)
        return logprobs, entropies, output.aux_loss if self._options else logprobs.new_zeros(())
