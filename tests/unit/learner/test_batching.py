"""Micro-batches have every sequence once, stay within the budget, and keep sequences apart."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.models.rows import Batching
from services.learner.batching import TokenColumns, balance, empty_micro_batch, pack, plan_layouts, split_batch
from services.learner.experience import TokenSequence, build_experience
from tests.unit.learner.samples import random_groups


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 400), st.sampled_from(Batching))
@settings(max_examples=200, deadline=None)
def test_every_sequence_is_packed_once_and_no_micro_batch_exceeds_the_budget(
    lengths: list[int], budget: int, batching: Batching
) -> None:
    layouts = plan_layouts(lengths, budget, batching)
    packed = [index for layout in layouts for row in layout for index in row]
    assert sorted(packed) == list(range(len(lengths)))
    for layout in layouts:
        row_lengths = [sum(lengths[index] for index in row) for row in layout]
        assert len(layout) * max(row_lengths) <= budget
        assert len(layout) == 1 or not batching.is_one_row
        assert all(len(row) == 1 for row in layout) or batching.is_packed
        assert len(layout) == 1 or batching is not Batching.SINGLE


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


def test_padded_batches_have_one_sequence_in_each_row() -> None:
    layouts = plan_layouts([50, *([10] * 45)], 500, Batching.PADDED)
    assert sorted(index for layout in layouts for row in layout for index in row) == list(range(46))
    assert {len(row) for layout in layouts for row in layout} == {1}
    assert len(layouts[0]) == 10


def _columns(num_tokens: int, **more: torch.Tensor) -> TokenColumns:
    places = torch.arange(num_tokens)
    return TokenColumns(places + 0.25, places + 0.5, places.double(), places, **more)


def test_packed_tensors_line_up_with_the_sequences() -> None:
    experience = build_experience([random_groups(3, 3)], needs_reference=False)
    sequences, starts = experience.sequences, experience.sequence_starts
    (layout,) = plan_layouts([len(s.token_ids) for s in sequences], 1000)
    batch = pack(sequences, starts, layout, _columns(experience.num_tokens))
    order = [index for row in layout for index in row]
    assert batch.tokens.lengths.tolist() == [len(sequences[index].positions) for index in order]
    flat_ids, flat_positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    start = 0
    for index in order:
        sequence = sequences[index]
        part = slice(start, start + len(sequence.positions))
        assert batch.targets[part].tolist() == sequence.token_ids[sequence.positions].tolist()
        predictors = batch.predictors[part]
        assert flat_positions[predictors].tolist() == (sequence.positions - 1).tolist()
        assert flat_ids[predictors].tolist() == sequence.token_ids[sequence.positions - 1].tolist()
        places = list(range(starts[index], starts[index] + len(sequence.positions)))
        assert batch.places[part].tolist() == places
        assert batch.columns.behaviour[part].tolist() == [place + 0.25 for place in places]
        assert batch.columns.versions_apart[part].tolist() == places
        start = part.stop
    assert start == len(batch.targets)
    assert sorted(batch.places.tolist()) == list(range(experience.num_tokens))


def test_positions_restart_with_every_sequence_and_go_on_through_the_padding() -> None:
    def sequence(length: int) -> TokenSequence:
        return TokenSequence(np.arange(length, dtype=np.int32), np.array([length - 1], dtype=np.int32))

    batch = pack([sequence(6), sequence(3), sequence(2)], [0, 1, 2], ((0,), (1, 2)), _columns(3))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]]
    assert batch.predictors.tolist() == [4, 7, 9]


def test_an_empty_micro_batch_has_tokens_but_trains_none() -> None:
    columns = _columns(4, reference=torch.zeros(4), is_kept=torch.ones(4, dtype=torch.bool))
    batch = empty_micro_batch(columns)
    assert batch.input_ids.numel() > 0
    assert len(batch.targets) == len(batch.tokens) == 0
    assert batch.columns.reference is not None
    assert len(batch.columns.reference) == 0
    assert batch.columns.old is None
    assert batch.to(torch.device("cpu")) is batch


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_group_goes_to_one_rank_and_no_rank_has_more_than_it_must(tokens: list[int], num_ranks: int) -> None:
    shares = balance(tokens, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(index for share in shares for index in share) == list(range(len(tokens)))
    loads = [sum(tokens[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)


def test_differencing_finds_splits_that_taking_the_largest_first_does_not() -> None:
    tokens = [8, 7, 6, 5, 4]
    loads = [sum(tokens[index] for index in share) for share in balance(tokens, 2)]
    assert abs(loads[0] - loads[1]) == 2


def test_groups_are_split_so_that_ranks_have_about_as_many_tokens() -> None:
    tokens = np.random.default_rng(1).integers(100, 1000, 32).tolist()
    loads = [sum(tokens[index] for index in share) for share in balance(tokens, 4)]
    assert max(loads) < 1.01 * min(loads)


def test_a_rank_may_have_no_group() -> None:
    assert sorted(balance([10], 3)) == [[], [], [0]]
    assert balance([], 2) == [[], []]


def test_a_batch_is_cut_into_optimiser_steps_in_its_order() -> None:
    steps = split_batch([10] * 10, num_steps=3, num_ranks=2)
    assert [sorted(index for share in step for index in share) for step in steps] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8, 9],
    ]
    assert split_batch([10], num_steps=2, num_ranks=1) == [[[]], [[0]]]
