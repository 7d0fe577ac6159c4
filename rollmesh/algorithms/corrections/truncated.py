"""Corrections that weigh each token by π_old / μ and limit that weight: by a cut, or by dropping tokens or sequences.

`tis` is truncated importance sampling (https://fengyao.notion.site/off-policy-rl; V-trace,
https://arxiv.org/abs/1802.01561), `icepop` is IcePop (https://arxiv.org/abs/2510.18855), `seq_mask_tis` is OpenRLHF's
sequence mask. OpenRLHF 0.11 leaves the weights of the sequence mask unclamped; here they are clamped, as the comment in
OpenRLHF's code says.
"""

from __future__ import annotations

import torch

from rollmesh.algorithms.corrections.correction import Corrected, Limits, Policies
from rollmesh.algorithms.ratios import sequence_ratios, token_ratios


def tis(policies: Policies, limits: Limits) -> Corrected:
    """Return the anchor π_old and the weights π_old / μ clamped to [low, high].

    Example: two tokens with the ratios 6 and 0.8.

        >>> from rollmesh.algorithms.segments import Segments
        >>> old, behaviour = torch.tensor([0.6, 0.4]).log(), torch.tensor([0.1, 0.5]).log()
        >>> policies = Policies(behaviour, old, old, torch.tensor([1, 1]), torch.ones(2), Segments(torch.tensor([2])))
        >>> tis(policies, Limits(low=0.5, high=5.0)).weights
        tensor([5.0000, 0.8000])
    """
    weights = token_ratios(policies.old, policies.behaviour)
    return Corrected(policies.old, weights.clamp(limits.low, limits.high))


def icepop(policies: Policies, limits: Limits) -> Corrected:
    """Return the anchor π_old and the weights π_old / μ; 0 where that weight is outside [low, high].

    Example: two tokens with the ratios 6 and 0.8.

        >>> from rollmesh.algorithms.segments import Segments
        >>> old, behaviour = torch.tensor([0.6, 0.4]).log(), torch.tensor([0.1, 0.5]).log()
        >>> policies = Policies(behaviour, old, old, torch.tensor([1, 1]), torch.ones(2), Segments(torch.tensor([2])))
        >>> icepop(policies, Limits(low=0.5, high=5.0)).weights
        tensor([0.0000, 0.8000])
    """
    weights = token_ratios(policies.old, policies.behaviour)
    is_inside = (weights >= limits.low) & (weights <= limits.high)
    return Corrected(policies.old, torch.where(is_inside, weights, torch.zeros_like(weights)))


def seq_mask_tis(policies: Policies, limits: Limits) -> Corrected:
    """Return the weights of `tis`, and 0 for all tokens of a sequence whose ratio is outside [low, high].

    The ratio of a sequence is the geometric mean of its tokens' ratios (`sequence_ratios`), so the length of the
    sequence does not decide.

    Example: the first sequence has the ratios 6 and 0.8. Their geometric mean is √4.8 = 2.19, so both tokens stay. The
    second sequence is a single token with the ratio 6.

        >>> from rollmesh.algorithms.segments import Segments
        >>> old, behaviour = torch.tensor([0.6, 0.4, 0.6]).log(), torch.tensor([0.1, 0.5, 0.1]).log()
        >>> two_sequences = Segments(torch.tensor([2, 1]))
        >>> policies = Policies(behaviour, old, old, torch.tensor([1, 1, 1]), torch.ones(3), two_sequences)
        >>> seq_mask_tis(policies, Limits(low=0.5, high=5.0)).weights
        tensor([5.0000, 0.8000, 0.0000])
    """
    ratios = sequence_ratios(policies.old, policies.behaviour, policies.tokens)
    is_inside = policies.tokens.spread((ratios >= limits.low) & (ratios <= limits.high))
    weights = token_ratios(policies.old, policies.behaviour).clamp(limits.low, limits.high)
    return Corrected(policies.old, torch.where(is_inside, weights, torch.zeros_like(weights)))
