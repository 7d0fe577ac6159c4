"""From one value per token to one number per optimiser step: a weight for every token.

Every way of averaging is a weighted sum over the tokens of the whole step, on all ranks. So the sums of the
micro-batches add up to the same number however the batch was cut. N is the number of tokens in the step, S of
sequences with tokens, G of groups with tokens:

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
    """Return the weight of each generated token in the policy's loss. Collective: one sum.

    Args:
        aggregation: `token_mean`, `sequence_mean`, `prompt_mean` or `constant`.
        tokens: the generated tokens of each sample.
        groups: the samples of each group.
        constant_tokens: the divisor of `constant`.
        sum_over_ranks: collective.

    Returns:
        float64 [N]. The weights sum to 1 over all ranks, except with `constant`.

    Example: two groups. The first has two samples, of 1 and 3 tokens; the second has one sample of 4 tokens. So
    N = 8, S = 3 and G = 2; a token of the second sample has the `sequence_mean` weight 1 / (3 · 3) = 0.1111.

        >>> tokens, groups = Segments(torch.tensor([1, 3, 4])), Segments(torch.tensor([2, 1]))
        >>> def first_token_of_each_sample(aggregation):
        ...     return token_weights(aggregation, tokens, groups, constant_tokens=10)[[0, 1, 4]]
        >>> first_token_of_each_sample("token_mean")
        tensor([0.1250, 0.1250, 0.1250], dtype=torch.float64)
        >>> first_token_of_each_sample("sequence_mean")
        tensor([0.3333, 0.1111, 0.0833], dtype=torch.float64)
        >>> first_token_of_each_sample("prompt_mean")
        tensor([0.1250, 0.1250, 0.1250], dtype=torch.float64)
        >>> first_token_of_each_sample("constant")
        tensor([0.0333, 0.0333, 0.0333], dtype=torch.float64)
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
    """Return ``Σ weights · values``. An infinite value of weight 0 changes neither the sum nor the gradient.

    Args:
        values: [N], differentiable.
        weights: [N], without gradient.

    >>> weighted_sum(torch.tensor([1.0, 3.0, torch.inf]), torch.tensor([0.5, 0.25, 0.0])).item()
    1.25
    """
    kept = weights != 0
    return (torch.where(kept, values, torch.zeros_like(values)) * weights.to(values.dtype)).sum()
