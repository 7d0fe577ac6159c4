"""Packing: every sequence once, within the budget, and nobody sees a neighbour."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.algorithms.registry import ALGORITHMS
from services.learner.batching import empty_micro_batch, pack, plan_layouts
from services.learner.experience import Sequence, build_experience
from tests.unit.learner.samples import random_groups


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 400), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_sequence_is_packed_once_and_no_micro_batch_exceeds_the_budget(
    lengths: list[int], budget: int, is_single_row: bool
) -> None:
    layouts = plan_layouts(lengths, budget, is_single_row)
    packed = [index for layout in layouts for row in layout for index in row]
    assert sorted(packed) == list(range(len(lengths)))
    for layout in layouts:
        row_lengths = [sum(lengths[index] for index in row) for row in layout]
        assert len(layout) * max(row_lengths) <= budget
        assert len(layout) == 1 or not is_single_row


def test_a_sequence_over_the_budget_has_a_micro_batch_of_its_own() -> None:
    assert plan_layouts([5, 200, 5], 100)[0] == ((1,),)


def test_rows_are_as_long_as_the_longest_sequence_so_that_attention_stays_cheap() -> None:
    (layout,) = plan_layouts([50, *([10] * 45)], 10_000)
    assert max(sum([50, *([10] * 45)][index] for index in row) for row in layout) == 50
    assert len(layout) == 10


def test_packing_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(10, 90, 256).tolist()
    layouts = plan_layouts(lengths, 4096)
    padded = sum(len(layout) * max(sum(lengths[i] for i in row) for row in layout) for layout in layouts)
    assert padded < 1.1 * sum(lengths)


def _sequences() -> tuple[Sequence, ...]:
    return build_experience(random_groups(3, 3), ALGORITHMS["grpo"], needs_reference=False).sequences


def test_packed_tensors_line_up_with_the_sequences() -> None:
    sequences = _sequences()
    (layout,) = plan_layouts([len(s.token_ids) for s in sequences], 1000)
    batch = pack(sequences, layout)
    order = [index for row in layout for index in row]
    flat_ids, flat_positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    start = 0
    for index in order:
        sequence = sequences[index]
        part = slice(start, start + len(sequence.positions))
        assert batch.targets[part].tolist() == sequence.token_ids[sequence.positions].tolist()
        predictors = batch.predictors[part]
        assert flat_positions[predictors].tolist() == (sequence.positions - 1).tolist()
        assert flat_ids[predictors].tolist() == sequence.token_ids[sequence.positions - 1].tolist()
        assert batch.behaviour_logprobs[part].tolist() == sequence.behaviour_logprobs.tolist()
        assert batch.advantages[part].tolist() == pytest.approx([sequence.advantage] * len(sequence.positions))
        start = part.stop
    assert start == len(batch.targets)


def test_positions_restart_with_every_sequence_and_go_on_through_the_padding() -> None:
    def sequence(length: int) -> Sequence:
        positions = np.array([length - 1], dtype=np.int32)
        return Sequence(np.arange(length, dtype=np.int32), positions, np.zeros(1, np.float32), None, 0.0)

    batch = pack([sequence(6), sequence(3), sequence(2)], ((0,), (1, 2)))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]]
    assert batch.predictors.tolist() == [4, 7, 9]


@pytest.mark.parametrize("has_reference", [True, False])
def test_an_empty_micro_batch_has_tokens_but_trains_none(has_reference: bool) -> None:
    batch = empty_micro_batch(has_reference)
    assert batch.input_ids.numel() > 0
    assert len(batch.targets) == 0
    assert (batch.reference_logprobs is not None) == has_reference
    assert batch.to(torch.device("cpu")) is batch
