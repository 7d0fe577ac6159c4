"""The choice of the next batch, over all sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.reference.batching import next_batch

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80)


@given(LENGTHS, st.integers(300, 5000))
def test_a_batch_keeps_to_the_budget_and_holds_the_oldest_request(lengths: list[int], budget: int) -> None:
    batch = next_batch(lengths, budget)
    assert 0 in batch
    assert len(set(batch)) == len(batch)
    assert max(lengths[index] for index in batch) * len(batch) <= budget


@given(LENGTHS, st.integers(300, 5000))
def test_a_batch_holds_neighbours_in_length(lengths: list[int], budget: int) -> None:
    batch = next_batch(lengths, budget)
    chosen = sorted(lengths[index] for index in batch)
    left_out = [length for index, length in enumerate(lengths) if index not in batch]
    assert not any(chosen[0] < length < chosen[-1] for length in left_out)


@given(LENGTHS, st.integers(300, 5000))
def test_requests_that_fit_into_one_batch_are_one_batch(lengths: list[int], budget: int) -> None:
    if max(lengths) * len(lengths) <= budget:
        assert sorted(next_batch(lengths, budget)) == list(range(len(lengths)))


@given(st.integers(1, 300), st.integers(1, 80), st.integers(300, 5000))
def test_requests_of_one_length_fill_the_batch(length: int, count: int, budget: int) -> None:
    assert len(next_batch([length] * count, budget)) == min(count, budget // length)
