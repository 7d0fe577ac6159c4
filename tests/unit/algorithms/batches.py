"""Random batches for the property tests, and ranks to share them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from rollmesh.algorithms.pipeline import Trajectories
from rollmesh.algorithms.reduction import SumOverRanks
from rollmesh.algorithms.segments import Segments
from tests.unit.algorithms.slow import Group, Sample

ResultT = TypeVar("ResultT")

RANK_TIMEOUT_S = 60.0
GRID = 64
"""Log-probabilities are multiples of 1 / GRID: their differences are exact in float32 too, and no ratio lies at a limit
of 0.2, 0.28, 3, 0.5 or 5."""

group_lengths = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5)
"""Generated tokens of each sample of each group; many have none or one."""
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])


def examples(count: int) -> settings:
    """So many random examples, however slow the machine; the same ones in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def segments(lengths: Sequence[int]) -> Segments:
    return Segments(torch.tensor(lengths, dtype=torch.int64))


@st.composite
def groups(draw: st.DrawFn, num_versions: int = 4) -> list[Group]:
    """Samples with environment tokens in between, of several versions, some truncated."""
    lengths, seed = draw(group_lengths), draw(seeds)
    generator = np.random.default_rng(seed)
    return [[_sample(length, generator, num_versions) for length in group] for group in lengths]


def _sample(length: int, generator: np.random.Generator, num_versions: int) -> Sample:
    gaps = generator.integers(1, 9, length) * (generator.random(length) < 0.4)
    return Sample(
        reward=float(generator.integers(-16, 17) / 8),
        version=int(generator.integers(0, num_versions)),
        offsets=[int(place) for place in np.arange(length) + gaps.cumsum()],
        is_truncated=bool(generator.random() < 0.3),
        kl=[float(x) for x in generator.normal(0, 0.1, length).astype(np.float32)],
        values=[float(x) for x in generator.normal(0, 1, length).astype(np.float32)],
    )


def trajectories(batch: Sequence[Group], dtype: torch.dtype = torch.float32) -> Trajectories:
    """The same batch as tensors, with its divergence and values of ``dtype``."""
    samples = [sample for group in batch for sample in group]
    return Trajectories(
        rewards=torch.tensor([s.reward for s in samples], dtype=torch.float64),
        groups=segments([len(group) for group in batch]),
        tokens=segments([len(s.offsets) for s in samples]),
        offsets=torch.tensor([x for s in samples for x in s.offsets], dtype=torch.int64),
        versions=torch.tensor([s.version for s in samples], dtype=torch.int64),
        is_truncated=torch.tensor([s.is_truncated for s in samples], dtype=torch.bool),
        kl=torch.tensor([x for s in samples for x in s.kl], dtype=dtype),
        values=torch.tensor([x for s in samples for x in s.values], dtype=dtype),
    )


def logprobs(generator: np.random.Generator, count: int, spread: float = 2.0) -> list[float]:
    """Log-probabilities on the grid, within ``spread`` of 0, here and there one of a token that cannot happen."""
    found = -np.round(generator.random(count) * spread * GRID) / GRID
    found[generator.random(count) < 0.05] = -1e4
    return [float(x) for x in found]


def eighths(generator: np.random.Generator, count: int) -> list[float]:
    """Numbers of either sign, some of them 0."""
    return [float(x) for x in generator.integers(-12, 13, count) / 8]


def on_ranks(work: Sequence[Callable[[SumOverRanks], ResultT]]) -> list[ResultT]:
    """Run each function as one rank, in a thread, with a sum over all of them; their results in order."""
    barrier = threading.Barrier(len(work), timeout=RANK_TIMEOUT_S)
    given: list[Tensor] = [torch.empty(0)] * len(work)

    def rank(number: int) -> ResultT:
        def sum_over_ranks(values: Tensor, /) -> Tensor:
            given[number] = values
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        try:
            return work[number](sum_over_ranks)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(rank, number) for number in range(len(work))]
        return [future.result(2 * RANK_TIMEOUT_S) for future in futures]


def cut(items: Sequence[ResultT], places: Sequence[int]) -> list[list[ResultT]]:
    """Into consecutive parts, at these places taken modulo the length; parts may be empty."""
    ends = [*sorted(place % (len(items) + 1) for place in places), len(items)]
    return [list(items[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
