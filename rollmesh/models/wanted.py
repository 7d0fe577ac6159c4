"""Logits of a causal language model at the wanted positions alone.

Prompts and environment tokens are often most of a batch, and the logits are the largest tensor of a pass. A hook in
front of the output layer keeps the hidden states of the wanted positions and drops the others. The model's own forward
pass continues from there, so that scaling and capping of the logits stay as the model defines them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class WantedLogits:
    """A causal language model whose output layer sees the wanted positions alone.

    The class is no torch module, so that its owner decides which module holds the model.

    Args:
        causal_lm: a model with output embeddings; a hook stays on them.
    """

    def __init__(self, causal_lm: Any) -> None:
        self._causal_lm = causal_lm
        self._wanted: Tensor | None = None
        causal_lm.get_output_embeddings().register_forward_pre_hook(self._select)

    def __call__(self, wanted: Tensor, **inputs: Any) -> Any:
        """Run the model once, without a cache.

        Args:
            wanted: int64 [N], flat indices into ``rows × L``.
            inputs: the model's arguments: ``input_ids`` int64 [rows, L], ``position_ids``, and so on.

        Returns:
            The model's output; its ``logits`` are [1, N, V].
        """
        self._wanted = wanted
        try:
            return self._causal_lm(**inputs, use_cache=False)
        finally:
            self._wanted = None

    def _select(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return [1, N, H] from [rows, L, H]; the inputs unchanged where another caller runs the model."""
        if self._wanted is None:
            return inputs
        return (inputs[0].flatten(0, 1)[self._wanted][None], *inputs[1:])
