"""From token losses to one number."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.algorithms.aggregate import token_weights, weighted_sum
from rollmesh.algorithms.variants import Aggregation
from tests.unit.algorithms import slow
from tests.unit.algorithms.batches import dtypes, eighths, examples, group_lengths, seeds, segments

CONSTANT_TOKENS = 7


def _weights(aggregation: str, lengths: list[list[int]]) -> torch.Tensor:
    tokens = segments([length for group in lengths for length in group])
    return token_weights(aggregation, tokens, segments([len(group) for group in lengths]), CONSTANT_TOKENS)


@examples(150)
@given(st.sampled_from(get_args(Aggregation)), group_lengths, seeds, dtypes)
def test_the_weighted_sum_is_the_slow_aggregation(
    aggregation: str, lengths: list[list[int]], seed: int, dtype: torch.dtype
) -> None:
    losses = eighths(np.random.default_rng(seed), sum(map(sum, lengths)))
    found = weighted_sum(torch.tensor(losses, dtype=dtype), _weights(aggregation, lengths))
    assert found.dtype == dtype
    assert found.item() == pytest.approx(slow.aggregated(aggregation, losses, lengths, CONSTANT_TOKENS), abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
def test_the_weights_of_a_mean_sum_to_1_and_samples_without_tokens_do_not_count(aggregation: str) -> None:
    weights = _weights(aggregation, [[3, 0, 1], [0], [2, 2]])
    assert weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(1.0)
    assert torch.equal(weights, _weights(aggregation, [[3, 1], [2, 2]]))


def test_the_four_aggregations_weigh_a_short_and_a_long_sequence_as_they_say() -> None:
    found = {aggregation: _weights(aggregation, [[1, 3], [2]]).tolist() for aggregation in get_args(Aggregation)}
    assert found["token_mean"] == pytest.approx([1 / 6] * 6)
    assert found["sequence_mean"] == pytest.approx([1 / 3, 1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6])
    assert found["prompt_mean"] == pytest.approx([1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 4, 1 / 4])
    assert found["constant"] == pytest.approx([1 / (3 * CONSTANT_TOKENS)] * 6)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_a_step_without_any_token_has_no_weights_and_no_loss(aggregation: str) -> None:
    weights = _weights(aggregation, [[0, 0], [0]])
    assert weights.shape == (0,)
    assert weighted_sum(torch.zeros(0), weights).item() == 0


@examples(60)
@given(group_lengths, st.integers(1, 4), st.sampled_from(get_args(Aggregation)), seeds)
def test_shares_of_micro_batches_add_up_however_the_tokens_are_cut(
    lengths: list[list[int]], size: int, aggregation: str, seed: int
) -> None:
    losses = torch.tensor(eighths(np.random.default_rng(seed), sum(map(sum, lengths))), dtype=torch.float64)
    weights = _weights(aggregation, lengths)
    shares = [weighted_sum(*part) for part in zip(losses.split(size), weights.split(size), strict=True)]
    torch.testing.assert_close(sum(shares, torch.zeros((), dtype=torch.float64)), weighted_sum(losses, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_token_of_weight_0_touches_neither_sum_nor_gradient_whatever_its_value(
    value: float, dtype: torch.dtype
) -> None:
    values = torch.tensor([1.0, value, 3.0, value], dtype=dtype, requires_grad=True)
    total = weighted_sum(values, torch.tensor([0.5, 0.0, 0.25, 0.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(total, values)
    assert total.item() == 1.25
    assert gradient.tolist() == [0.5, 0.0, 0.25, 0.0]
