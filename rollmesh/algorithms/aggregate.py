"""From one value per token to one number per optimiser step: a weight for every token.

Every way of averaging is a weighted sum over the tokens of the whole step, on all ranks, so that the shares of
micro-batches simply add up however the batch was cut. With N tokens, S sequences and G groups that have any:

================  =====================================
`token_mean`      1 / N
`sequence_mean`   1 / (S · tokens of the sequence)
`prompt_mean`     1 / (G · tokens of the group)
`constant`        1 / (S · a constant number of tokens)
================  =====================================

`token_mean` is DAPO's (https://arxiv.org/abs/2503.14476), `sequence_mean` GRPO's and GSPO's, `prompt_mean` ScaleRL's
(https://arxiv.org/abs/2510.13786), `constant` Dr. GRPO's (https://arxiv.org/abs/2503.20783).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollmesh.algorithms.reduction import SumOverRanks, alone
from rollmesh.algorithms.segments import Segments


def token_weights(
    aggregation: str,
    tokens: Segments,
    groups: Segments,
    constant_tokens: int,
    sum_over_ranks: SumOverRanks = alone,
) -> Tensor:
    """The weight of each generated token in the policy's loss. Collective: one sum.

    Args:
        aggregation: `token_mean`, `sequence_mean`, `prompt_mean` or `constant`.
        tokens: the generated tokens of each sample.
        groups: the samples of each group.
        constant_tokens: the divisor of `constant`.
        sum_over_ranks: collective.

    Returns:
        float64 [N]. They sum to 1 over all ranks, except for `constant`.
    """
    of_group = groups.sums(tokens.lengths)
    counts = torch.stack([tokens.lengths.sum(), (tokens.lengths > 0).sum(), (of_group > 0).sum()]).double()
    num_tokens, num_sequences, num_groups = sum_over_ranks(counts).clamp(min=1)
    if aggregation == "token_mean":
        of_sample = torch.ones_like(tokens.lengths, dtype=torch.float64) / num_tokens
    elif aggregation == "sequence_mean":
        of_sample = 1.0 / (num_sequences * tokens.lengths.clamp(min=1))
    elif aggregation == "prompt_mean":
        of_sample = 1.0 / (num_groups * groups.spread(of_group).clamp(min=1))
    else:
        of_sample = torch.ones_like(tokens.lengths, dtype=torch.float64) / (num_sequences * constant_tokens)
    return tokens.spread(of_sample)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """``Σ weights · values``. Tokens of weight 0 are left out: an infinity there touches neither sum nor gradient.

    Args:
        values: [N], differentiable.
        weights: [N], without gradient.
    """
    kept = weights != 0
    return (torch.where(kept, values, torch.zeros_like(values)) * weights.to(values.dtype)).sum()
