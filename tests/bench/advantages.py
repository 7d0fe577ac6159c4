"""Advantages of one large batch against the loop over tokens that the formulas suggest.

Both do generalised advantages over the generated tokens and whiten them over the whole batch; then rewards less their
group's mean over its deviation, for every token. Both begin and end with tensors; the loop turns them into lists and
back, which is the fastest way to loop in Python. It gets a few samples, so that it ends soon, and its time is scaled up
by the number of samples.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import torch

from rollmesh.algorithms.config import AdvantageSection
from rollmesh.algorithms.pipeline import Trajectories, estimate_advantages
from rollmesh.algorithms.segments import Segments
from tests.bench.figures import Figure, median, paired, timed

NUM_SAMPLES = 1024
GROUP_SIZE = 8
TOKENS_EACH = 8192
LOOP_SAMPLES = 16
LAMBDA = 0.95
CRITIC = AdvantageSection(estimator="gae", gae_lambda=LAMBDA)
GROUPS = AdvantageSection(estimator="group_norm")


def run(quick: bool) -> list[Figure]:
    """Seconds for the whole batch, in turns, single-threaded."""
    torch.set_num_threads(1)
    batch, few = _batch(NUM_SAMPLES), _batch(LOOP_SAMPLES)
    for found, expected in zip(_ours(few), _loop(few), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    scale = NUM_SAMPLES / LOOP_SAMPLES
    pairs = paired(
        3 if quick else 9,
        lambda: scale * timed(lambda: _loop(few)),
        lambda: timed(lambda: _ours(batch)),
    )
    return [
        Figure(
            "advantage_time",
            f"time of a Python loop over tokens (measured on {LOOP_SAMPLES} samples, scaled to {NUM_SAMPLES:,}) "
            f"/ of ours, {TOKENS_EACH:,} tokens each",
            None,
            "at least",
            [theirs / ours for theirs, ours in pairs],
            {
                "loop_scaled_s": median([theirs for theirs, _ in pairs]),
                "loop_measured_s": median([theirs for theirs, _ in pairs]) / scale,
                "ours_s": median([ours for _, ours in pairs]),
                "num_samples": NUM_SAMPLES,
                "num_loop_samples": LOOP_SAMPLES,
                "tokens_per_sample": TOKENS_EACH,
            },
        )
    ]


def _batch(num_samples: int) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    num_tokens = num_samples * TOKENS_EACH
    return Trajectories(
        rewards=torch.rand(num_samples, generator=generator, dtype=torch.float64),
        groups=Segments(torch.full((num_samples // GROUP_SIZE,), GROUP_SIZE)),
        tokens=Segments(torch.full((num_samples,), TOKENS_EACH)),
        offsets=torch.arange(TOKENS_EACH).repeat(num_samples),
        versions=torch.zeros(num_samples, dtype=torch.int64),
        is_truncated=torch.zeros(num_samples, dtype=torch.bool),
        values=torch.rand(num_tokens, generator=generator),
    )


def _ours(batch: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    """With a critic, then without; each cuts the batch into segments first."""
    found = []
    for section in (CRITIC, GROUPS):
        fresh = replace(batch, groups=Segments(batch.groups.lengths), tokens=Segments(batch.tokens.lengths))
        found.append(estimate_advantages(fresh, fresh.rewards, section, (-10.0, 10.0)).advantages)
    return found[0], found[1]


def _loop(batch: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two, over lists."""
    assert batch.values is not None
    rewards, values = batch.rewards.tolist(), batch.values.view(-1, TOKENS_EACH).tolist()
    return torch.tensor(_whitened(_bootstrapped(rewards, values))), torch.tensor(_compared(rewards))


def _bootstrapped(rewards: list[float], values: list[list[float]]) -> list[float]:
    advantages: list[float] = []
    for reward, of_sample in zip(rewards, values, strict=True):
        backwards, following, next_value, token_reward = [], 0.0, 0.0, reward
        for value in reversed(of_sample):
            following = token_reward + next_value - value + LAMBDA * following
            backwards.append(following)
            next_value, token_reward = value, 0.0
        advantages += reversed(backwards)
    return advantages


def _whitened(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    squares = 0.0
    for value in values:
        squares += (value - mean) ** 2
    deviation = math.sqrt(max(squares / len(values), 1e-8))
    return [(value - mean) / deviation for value in values]


def _compared(rewards: list[float]) -> list[float]:
    advantages: list[float] = []
    for start in range(0, len(rewards), GROUP_SIZE):
        group = rewards[start : start + GROUP_SIZE]
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        for reward in group:
            following = 0.0
            for token in range(TOKENS_EACH):
                following += 0.0 if token else (reward - mean) / (deviation + 1e-9)
                advantages.append(following)
    return advantages
