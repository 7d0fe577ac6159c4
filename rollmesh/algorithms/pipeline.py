"""From a batch's rewards to an advantage for every generated token, in the order of the steps.

::

    rewards [S] ─► running normalisation ─► overlong ─► stop properly ─► group baseline ─► clip
            ─► on each last token, less β·KL on every token [N] ─► GAE or discounted return ─► whitening ─► [N]

All tensors belong to one rank. All samples of a group are on one rank. Two steps need the whole batch, normalisation
and whitening. They sum over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rollmesh.algorithms.advantages import ESTIMATORS, generalised_advantages, generalised_advantages_over_all
from rollmesh.algorithms.comparison import Comparison
from rollmesh.algorithms.config import AdvantageSection, RewardShapingSection
from rollmesh.algorithms.reduction import SumOverRanks, alone
from rollmesh.algorithms.rewards import overlong_penalty, stop_properly
from rollmesh.algorithms.segments import Segments
from rollmesh.algorithms.whitening import RunningMoments, whiten


@dataclass(frozen=True, slots=True)
class Trajectories:
    """The samples from which advantages are computed: S samples of G groups with N generated tokens.

    Attributes:
        rewards: float64 [S], as the reward service scored them.
        groups: the samples of each group.
        tokens: the generated tokens of each sample; a sample may have none.
        offsets: int64 [N], the place of each generated token in its response; the environment's tokens count too.
        versions: int64 [S], the number of the oldest policy version in each sample; 0 for a sample without tokens.
        is_truncated: bool [S], whether the sample ended at the limit of tokens.
        kl: float [N], the coefficient × the estimated divergence from the reference, which is subtracted from each
            token's reward; None subtracts nothing.
        values: float [N], the critic's value of the state before each generated token; None without a critic.
    """

    rewards: Tensor
    groups: Segments
    tokens: Segments
    offsets: Tensor
    versions: Tensor
    is_truncated: Tensor
    kl: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Advantages:
    """The result of the reward pipeline: an advantage for each generated token.

    Attributes:
        advantages: float32 [N], the advantage of each generated token.
        returns: float32 [N], the critic's targets; without a critic, the advantages before whitening.
        rewards: float64 [S], the rewards after normalisation and penalties, before the group's baseline.
    """

    advantages: Tensor
    returns: Tensor
    rewards: Tensor


def shape_rewards(
    batch: Trajectories, settings: RewardShapingSection, max_new_tokens: int, moments: RunningMoments
) -> Tensor:
    """Return the rewards after normalisation and penalties, float64 [S].

    Args:
        batch: the samples.
        settings: the normalisation and the penalties that apply.
        max_new_tokens: the limit of generated tokens of a sample.
        moments: the moments of all rewards so far, this batch's included; used where ``settings.normalize`` is on.
    """
    rewards = batch.rewards.double()
    if settings.normalize:
        rewards = moments.normalise(rewards)
    if settings.overlong_buffer_tokens is not None:
        spans = _spans(batch)
        rewards = rewards + overlong_penalty(
            spans, max_new_tokens, settings.overlong_buffer_tokens, settings.overlong_penalty
        )
    if settings.stop_properly_coef is not None:
        rewards = stop_properly(rewards, batch.is_truncated, settings.stop_properly_coef)
    return rewards


def estimate_advantages(
    batch: Trajectories,
    rewards: Tensor,
    settings: AdvantageSection,
    clip: tuple[float, float] | None,
    sum_over_ranks: SumOverRanks = alone,
) -> Advantages:
    """Return the advantages of a batch. Collective where the settings whiten.

    The steps: subtract the baseline, clip, put rewards on tokens, sum returns, whiten.

    Args:
        batch: the samples.
        rewards: float64 [S], from `shape_rewards`.
        settings: the estimator and its settings.
        clip: the limits of the reward after the baseline; None sets no limits.
        sum_over_ranks: a function that sums a tensor over ranks; collective.

    Raises:
        ValueError: the estimator needs a critic's values, and the batch has none.

    Example: two samples of one group have 1 and 2 tokens and the rewards 1 and 0. The mean reward is 0.5.

        >>> import torch
        >>> lengths, rewards = torch.tensor([1, 2]), torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> versions, is_truncated = torch.tensor([0, 0]), torch.tensor([False, False])
        >>> groups, tokens, offsets = Segments(torch.tensor([2])), Segments(lengths), torch.tensor([0, 0, 1])
        >>> batch = Trajectories(rewards, groups, tokens, offsets, versions, is_truncated)
        >>> estimate_advantages(batch, rewards, AdvantageSection(estimator="dr_grpo"), clip=None).advantages.tolist()
        [0.5, -0.5, -0.5]
    """
    estimator = ESTIMATORS[settings.estimator]
    shaped = estimator.baseline(rewards, Comparison(batch.groups, batch.versions, settings.mixed_version))
    if clip is not None:
        shaped = shaped.clamp(*clip)
    if estimator.uses_values:
        if batch.values is None:
            raise ValueError(f"{settings.estimator} needs the values of a critic")
        values = batch.values.double()
        advantages = _bootstrapped(_token_rewards(batch, shaped), values, batch, settings)
        returns = advantages + values
    else:
        advantages = returns = _returns(batch, shaped, settings.gamma if estimator.is_discounted else 1.0)
    if settings.should_whiten:
        advantages = whiten(advantages, settings.should_scale, sum_over_ranks)
    return Advantages(advantages.float(), returns.float(), rewards)


def _token_rewards(batch: Trajectories, rewards: Tensor) -> Tensor:
    """Return each sample's reward on its last token, less the KL penalty on every token, float64 [N]."""
    token_rewards = batch.tokens.last(rewards)
    return token_rewards if batch.kl is None else token_rewards - batch.kl.double()


def _returns(batch: Trajectories, rewards: Tensor, gamma: float) -> Tensor:
    """Return the discounted return of each token, float64 [N].

    Without a KL penalty and with γ 1, the return of every token is the sample's reward. With γ 0.5, the reward 1 of a
    sample of two tokens gives the returns 0.5 and 1.
    """
    if batch.kl is None and gamma == 1.0:
        return batch.tokens.spread(rewards)
    return batch.tokens.discounted_sums(_token_rewards(batch, rewards), gamma)


def _bootstrapped(rewards: Tensor, values: Tensor, batch: Trajectories, settings: AdvantageSection) -> Tensor:
    if settings.gae_over == "generated":
        return generalised_advantages(rewards, values, batch.tokens, settings.gamma, settings.gae_lambda)
    return generalised_advantages_over_all(
        rewards, values, batch.tokens, batch.offsets, settings.gamma, settings.gae_lambda
    )


def _spans(batch: Trajectories) -> Tensor:
    """Return the number of tokens from the first to the last generated token, int64 [S]; 0 where none is generated."""
    tokens, filled = batch.tokens, ~batch.tokens.is_empty
    spans = tokens.lengths.clone()
    first, last = (tokens.ends - tokens.lengths)[filled], (tokens.ends - 1)[filled]
    spans[filled] = batch.offsets[last] - batch.offsets[first] + 1
    return spans
