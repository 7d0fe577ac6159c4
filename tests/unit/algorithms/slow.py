"""The maths once more, in loops over lists and from the formulas: what `rollmesh.algorithms` is checked against.

Nothing of the library, and no tensor, is used here. Per-token lists run over the generated tokens of all samples, in
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Values = list[float]
MAX_LOG_RATIO = 20.0


@dataclass
class Sample:
    """One trajectory; ``offsets`` are the places of its generated tokens in the response."""

    reward: float
    version: int
    offsets: list[int]
    is_truncated: bool = False
    kl: Values = field(default_factory=list)
    values: Values = field(default_factory=list)


Group = list[Sample]


def bounded(value: float, low: float | None, high: float | None) -> float:
    """Within limits, of which either may be absent."""
    if low is not None and value < low:
        return low
    if high is not None and value > high:
        return high
    return value


# Rewards


def shaped_reward(
    sample: Sample, max_tokens: int, buffer_tokens: int | None, penalty: float, stop_coef: float | None
) -> float:
    """Overlong penalty, then the penalty on answers that were cut."""
    reward = sample.reward
    if buffer_tokens is not None and sample.offsets:
        length = sample.offsets[-1] - sample.offsets[0] + 1
        excess = min(length - (max_tokens - buffer_tokens), buffer_tokens)
        if excess > 0:
            reward -= excess / buffer_tokens * penalty
    if stop_coef is not None and sample.is_truncated:
        reward = stop_coef * reward if stop_coef >= 0 else stop_coef
    return reward


def baselined(estimator: str, rewards: Values, versions: Sequence[int], mixed_version: str = "allow") -> Values:
    """Rewards of one group less what the estimator subtracts."""
    return [
        _baselined_one(estimator, i, rewards, [_pair_weight(mixed_version, versions[i], v) for v in versions])
        for i in range(len(rewards))
    ]


def _pair_weight(mixed_version: str, one: int, other: int) -> float:
    if mixed_version == "same_version":
        return 1.0 if one == other else 0.0
    return 1.0 / (1 + abs(one - other)) if mixed_version == "weight" else 1.0


def _baselined_one(estimator: str, i: int, rewards: Values, weights: Values) -> float:
    if estimator in ("gae", "reinforce"):
        return rewards[i]
    if estimator == "rloo":
        others = [(w, r) for j, (w, r) in enumerate(zip(weights, rewards, strict=True)) if j != i and w > 0]
        return rewards[i] - sum(w * r for w, r in others) / sum(w for w, _ in others) if others else 0.0
    total = sum(weights)
    mean = sum(w * r for w, r in zip(weights, rewards, strict=True)) / total
    if estimator in ("reinforce_baseline", "dr_grpo"):
        return rewards[i] - mean
    if sum(w > 0 for w in weights) == 1:
        return 0.0
    squares = sum(w * (r - mean) ** 2 for w, r in zip(weights, rewards, strict=True))
    variance = squares / (total - sum(w * w for w in weights) / total)
    return (rewards[i] - mean) / (math.sqrt(variance) + 1e-9)


# Advantages


def gae(rewards: Values, values: Values, gamma: float, lam: float) -> Values:
    """``A_j = Σ_k (γλ)^k δ_{j+k}``, from the end."""
    advantages = [0.0] * len(rewards)
    following = next_value = 0.0
    for j in reversed(range(len(rewards))):
        following = rewards[j] + gamma * next_value - values[j] + gamma * lam * following
        advantages[j], next_value = following, values[j]
    return advantages


def gae_over_all(rewards: Values, values: Values, offsets: Sequence[int], gamma: float, lam: float) -> Values:
    """The environment's tokens are steps too, of value and reward 0."""
    length = offsets[-1] + 1 if offsets else 0
    place = {offset: j for j, offset in enumerate(offsets)}
    all_rewards = [rewards[place[k]] if k in place else 0.0 for k in range(length)]
    all_values = [values[place[k]] if k in place else 0.0 for k in range(length)]
    result = gae(all_rewards, all_values, gamma, lam)
    return [result[offset] for offset in offsets]


def discounted_sums(values: Values, discount: float) -> Values:
    """``y_j = Σ_k discount^(k - j) x_k`` for k from j on."""
    return gae(values, [0.0] * len(values), discount, 1.0)


def whitened(values: Values, should_scale: bool) -> Values:
    """Less the mean, over the population deviation."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / len(values)
    scale = math.sqrt(max(variance, 1e-8)) if should_scale else 1.0
    return [(x - mean) / scale for x in values]


@dataclass
class Settings:
    """Of one run of the whole way from rewards to advantages; names as in the configuration."""

    estimator: str = "group_norm"
    mixed_version: str = "allow"
    gamma: float = 1.0
    gae_lambda: float = 1.0
    gae_over: str = "generated"
    whitening: str = "none"
    clip: tuple[float, float] | None = (-10.0, 10.0)
    max_tokens: int = 100
    buffer_tokens: int | None = None
    penalty: float = 1.0
    stop_coef: float | None = None


def advantages(groups: Sequence[Group], settings: Settings) -> tuple[Values, Values]:
    """Advantages and returns of all generated tokens."""
    found: Values = []
    returns: Values = []
    for group in groups:
        rewards = [
            shaped_reward(s, settings.max_tokens, settings.buffer_tokens, settings.penalty, settings.stop_coef)
            for s in group
        ]
        shaped = baselined(settings.estimator, rewards, [s.version for s in group], settings.mixed_version)
        for sample, reward in zip(group, shaped, strict=True):
            of_sample = _of_sample(sample, reward, settings)
            found += of_sample
            values = sample.values if settings.estimator == "gae" else [0.0] * len(of_sample)
            returns += [a + v for a, v in zip(of_sample, values, strict=True)]
    return (found if settings.whitening == "none" else whitened(found, settings.whitening == "full")), returns


def _of_sample(sample: Sample, reward: float, settings: Settings) -> Values:
    length = len(sample.offsets)
    reward = reward if settings.clip is None else bounded(reward, *settings.clip)
    token_rewards = [-sample.kl[j] if sample.kl else 0.0 for j in range(length)]
    if length:
        token_rewards[-1] += reward
    if settings.estimator == "gae" and settings.gae_over == "all":
        return gae_over_all(token_rewards, sample.values, sample.offsets, settings.gamma, settings.gae_lambda)
    if settings.estimator == "gae":
        return gae(token_rewards, sample.values, settings.gamma, settings.gae_lambda)
    return discounted_sums(token_rewards, settings.gamma if settings.estimator == "reinforce" else 1.0)


# Losses


@dataclass
class Clip:
    """Limits of the ratio; None has none."""

    low: float | None
    high: float | None
    dual: float | None = None

    def __call__(self, ratio: float) -> float:
        low = None if self.low is None else 1 - self.low
        high = None if self.high is None else 1 + self.high
        return bounded(ratio, low, high)


@dataclass
class TokenLoss:
    """Of one token; whether a limit changed its surrogate (CISPO: its weight)."""

    loss: float
    ratio: float
    is_low: bool = False
    is_high: bool = False


def log_ratio(policy: float, anchor: float) -> float:
    """Within ±20."""
    return bounded(policy - anchor, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def surrogate(ratio: float, advantage: float, clip: Clip) -> TokenLoss:
    """PPO's pessimistic bound, and the dual one."""
    plain, clipped = ratio * advantage, clip(ratio) * advantage
    gain, is_cut = min(plain, clipped), clipped < plain
    is_high = is_cut and ratio > 1
    if clip.dual is not None and advantage < 0 and gain < clip.dual * advantage:
        gain, is_high = clip.dual * advantage, True
    return TokenLoss(-gain, ratio, is_cut and ratio < 1, is_high)


def policy_losses(
    kind: str,
    logprobs: Values,
    anchor: Values,
    advantages: Values,
    lengths: Sequence[int],
    clip: Clip,
    fixed: Values | None = None,
) -> list[TokenLoss]:
    """``fixed`` are the log-probabilities where the loss takes no gradient of them; None takes ``logprobs``."""
    fixed = logprobs if fixed is None else fixed
    found: list[TokenLoss] = []
    for part in sequences(lengths):
        logs = [logprobs[j] - anchor[j] for j in part]
        mean = bounded(sum(logs) / len(logs), -MAX_LOG_RATIO, MAX_LOG_RATIO) if logs else 0.0
        for j in part:
            ratio = math.exp(log_ratio(fixed[j], anchor[j]))
            if kind == "ppo":
                found.append(surrogate(math.exp(log_ratio(logprobs[j], anchor[j])), advantages[j], clip))
            elif kind == "gspo":
                found.append(surrogate(math.exp(mean), advantages[j], clip))
            elif kind == "cispo":
                weight = clip(ratio)
                found.append(TokenLoss(-weight * advantages[j] * logprobs[j], ratio, weight > ratio, weight < ratio))
            else:
                found.append(TokenLoss(-advantages[j] * logprobs[j], ratio))
    return found


def sequences(lengths: Sequence[int]) -> list[range]:
    """The token numbers of each sequence."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def value_loss(value: float, old: float, target: float, clip: float) -> float:
    """The worse of the critic's error with and without the clip."""
    near = old + bounded(value - old, -clip, clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


# Corrections


def weight(policy: float, behaviour: float) -> float:
    """Importance weight of a token."""
    return math.exp(log_ratio(policy, behaviour))


def tis(old: Values, behaviour: Values, low: float, high: float) -> Values:
    return [bounded(weight(p, b), low, high) for p, b in zip(old, behaviour, strict=True)]


def icepop(old: Values, behaviour: Values, low: float, high: float) -> Values:
    found = [weight(p, b) for p, b in zip(old, behaviour, strict=True)]
    return [w if low <= w <= high else 0.0 for w in found]


def seq_mask_tis(old: Values, behaviour: Values, lengths: Sequence[int], low: float, high: float) -> Values:
    found = tis(old, behaviour, low, high)
    for part in sequences(lengths):
        product = math.exp(sum(log_ratio(old[j], behaviour[j]) for j in part) / len(part)) if part else 1.0
        for j in part:
            found[j] = found[j] if low <= product <= high else 0.0
    return found


def proximal(current: Values, behaviour: Values, versions_apart: Sequence[int]) -> Values:
    """Interpolated: the newer the token, the nearer to its own policy."""
    found = []
    for now, then, apart in zip(current, behaviour, versions_apart, strict=True):
        alpha = 1.0 / apart if apart > 0 else 0.0
        found.append(alpha * then + (1 - alpha) * now)
    return found


def decoupled(anchor: Values, behaviour: Values, high: float) -> Values:
    found = [weight(p, b) for p, b in zip(anchor, behaviour, strict=True)]
    return [w if w <= high else 0.0 for w in found]


def second_moment_mask(old: Values, behaviour: Values, advantages: Values, limit: float) -> tuple[list[bool], float]:
    """By sorting, equal tokens together; and how near a decision was, as a distance from the limit."""
    ratios = [log_ratio(p, b) for p, b in zip(old, behaviour, strict=True)]
    outward = [(r > 0 and a > 0) or (r < 0 and a < 0) for r, a in zip(ratios, advantages, strict=True)]
    squares = [r * r for r, goes_out in zip(ratios, outward, strict=True) if goes_out]
    threshold, margin = -1.0, math.inf
    for candidate in sorted(set(squares)):
        kept = [s for s in squares if s <= candidate]
        mean = math.fsum(kept) / len(kept)
        margin = min(margin, abs(mean - limit))
        if mean <= limit:
            threshold = candidate
    return [not goes_out or r * r <= threshold for r, goes_out in zip(ratios, outward, strict=True)], margin


def binary_divergence(behaviour: float, current: float, kind: str) -> float:
    """Between "this token or another" under the two policies."""
    mu, pi = math.exp(behaviour), math.exp(current)
    if kind == "tv":
        return 0.5 * (abs(mu - pi) + abs((1 - mu) - (1 - pi)))
    first = mu * (behaviour - current) if mu > 0 else 0.0
    if mu == 1:
        return first
    return first + (1 - mu) * (math.log(1 - mu) - math.log(1 - pi)) if pi < 1 else math.inf


def dppo(behaviour: Values, current: Values, advantages: Values, kind: str, limit: float) -> Values:
    found = []
    for then, now, advantage in zip(behaviour, current, advantages, strict=True):
        moves_away = (advantage > 0 and now > then) or (advantage < 0 and now < then)
        found.append(0.0 if moves_away and binary_divergence(then, now, kind) > limit else 1.0)
    return found


# Aggregation and divergence


def aggregated(aggregation: str, losses: Values, groups: Sequence[Sequence[int]], constant_tokens: int) -> float:
    """One number from the token losses; ``groups`` are the lengths of the samples of each group."""
    parts = iter(sequences([length for group in groups for length in group]))
    of_groups = [[[losses[j] for j in next(parts)] for _ in group] for group in groups]
    of_samples = [tokens for group in of_groups for tokens in group if tokens]
    if not of_samples:
        return 0.0
    if aggregation == "token_mean":
        return sum(losses) / len(losses)
    if aggregation == "sequence_mean":
        return sum(sum(tokens) / len(tokens) for tokens in of_samples) / len(of_samples)
    if aggregation == "constant":
        return sum(sum(tokens) / constant_tokens for tokens in of_samples) / len(of_samples)
    flat = [[x for tokens in group for x in tokens] for group in of_groups]
    means = [sum(tokens) / len(tokens) for tokens in flat if tokens]
    return sum(means) / len(means)


def kl(estimator: str, logprob: float, reference: float) -> float:
    """Within ±10."""
    d = logprob - reference
    if estimator == "k1":
        found = d
    elif estimator == "k2":
        found = d * d / 2
    else:
        found = math.exp(-d) - 1 + d if d > -700 else math.inf
    return bounded(found, -10.0, 10.0)


def adapted(coef: float, divergence: float, target: float, num_samples: int, horizon: int) -> float:
    """The penalty's coefficient after a batch."""
    return coef * (1 + bounded(divergence / target - 1, -0.2, 0.2) * num_samples / horizon)


def gradient(function: Callable[[Values], float], at: Values, step: float = 1e-6) -> Values:
    """By central differences."""
    found = []
    for j in range(len(at)):
        above, below = list(at), list(at)
        above[j] += step
        below[j] -= step
        found.append((function(above) - function(below)) / (above[j] - below[j]))
    return found
