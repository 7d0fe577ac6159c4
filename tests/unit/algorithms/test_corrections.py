"""Anchors and weights of the off-policy corrections, against the slow implementation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rollmesh.algorithms.corrections import CORRECTIONS, Corrected, Limits, Policies
from rollmesh.algorithms.corrections.dppo import binary_divergence
from rollmesh.algorithms.corrections.m2po import second_moment_mask
from tests.unit.algorithms import slow
from tests.unit.algorithms.batches import dtypes, eighths, examples, logprobs, seeds, segments

lengths_of_sequences = st.lists(st.integers(0, 6), min_size=1, max_size=6)
LOW, HIGH = 0.5, 5.0


def _policies(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Policies:
    generator, count = np.random.default_rng(seed), sum(lengths)
    behaviour, old, current = (torch.tensor(logprobs(generator, count, 3.0), dtype=dtype) for _ in range(3))
    return Policies(
        behaviour=behaviour,
        old=old,
        current=current,
        versions_apart=torch.tensor(generator.integers(0, 4, count)),
        advantages=torch.tensor(eighths(generator, count), dtype=dtype),
        tokens=segments(lengths),
    )


def _is_close(result: Corrected, anchor: list[float], weights: list[float]) -> None:
    precision = 1e-5 if result.weights.dtype == torch.float32 else 1e-9
    assert result.anchor.tolist() == pytest.approx(anchor, rel=precision)
    assert result.weights.tolist() == pytest.approx(weights, rel=precision, abs=1e-9)
    assert not result.weights.requires_grad


@examples(200)
@given(st.sampled_from(["tis", "icepop", "seq_mask_tis"]), lengths_of_sequences, seeds, dtypes)
def test_truncated_and_dropped_weights_are_the_slow_ones(
    name: str, lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    policies = _policies(lengths, seed, dtype)
    old, behaviour = policies.old.tolist(), policies.behaviour.tolist()
    expected = {
        "tis": lambda: slow.tis(old, behaviour, LOW, HIGH),
        "icepop": lambda: slow.icepop(old, behaviour, LOW, HIGH),
        "seq_mask_tis": lambda: slow.seq_mask_tis(old, behaviour, lengths, LOW, HIGH),
    }[name]()
    _is_close(CORRECTIONS[name, "old"](policies, Limits(LOW, HIGH)), old, expected)


@examples(100)
@given(lengths_of_sequences, seeds, dtypes, st.booleans())
def test_decoupled_weights_are_the_slow_ones_with_either_proximal_policy(
    lengths: list[int], seed: int, dtype: torch.dtype, is_approximated: bool
) -> None:
    policies = _policies(lengths, seed, dtype)
    behaviour, anchor = policies.behaviour.tolist(), policies.old.tolist()
    if is_approximated:
        anchor = slow.proximal(policies.current.tolist(), behaviour, policies.versions_apart.tolist())
    result = CORRECTIONS["decoupled", "old"](policies, Limits(high=HIGH, is_approximated=is_approximated))
    _is_close(result, anchor, slow.decoupled(anchor, behaviour, HIGH))


@examples(60)
@given(lengths_of_sequences, seeds, dtypes)
def test_without_weights_every_token_counts_fully_against_the_policy_that_was_chosen(
    lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    policies = _policies(lengths, seed, dtype)
    ones = [1.0] * sum(lengths)
    _is_close(CORRECTIONS["none", "old"](policies, Limits()), policies.old.tolist(), ones)
    _is_close(CORRECTIONS["none", "behaviour"](policies, Limits()), policies.behaviour.tolist(), ones)


@examples(150)
@given(lengths_of_sequences, seeds, dtypes, st.sampled_from([("tv", 0.2), ("kl", 0.05)]))
def test_dppo_drops_what_the_slow_one_drops(
    lengths: list[int], seed: int, dtype: torch.dtype, limit: tuple[str, float]
) -> None:
    policies = _policies(lengths, seed, dtype)
    behaviour, current = policies.behaviour.tolist(), policies.current.tolist()
    result = CORRECTIONS["dppo", "behaviour"](policies, Limits(divergence=limit[0], divergence_limit=limit[1]))
    _is_close(result, behaviour, slow.dppo(behaviour, current, policies.advantages.tolist(), *limit))


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_binary_divergences_are_the_slow_ones_and_never_negative(kind: str) -> None:
    pairs = [(-1.0, -2.0), (-0.01, -3.0), (-5.0, -0.1), (-1e-9, -1e-9), (-0.5, -0.5), (-50.0, -2.0), (-0.2, -50.0)]
    behaviour, current = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = binary_divergence(behaviour, current, kind)
    expected = [slow.binary_divergence(*(torch.tensor(x).item() for x in pair), kind) for pair in pairs]
    assert (found >= 0).all()
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@examples(150)
@given(st.integers(0, 30), seeds, dtypes, st.sampled_from([1e-3, 0.04, 0.5, 30.0, 1e3]))
def test_the_second_moment_mask_is_the_one_found_by_sorting(
    count: int, seed: int, dtype: torch.dtype, limit: float
) -> None:
    policies = _policies([count], seed, dtype)
    columns = (policies.old, policies.behaviour, policies.advantages)
    expected, margin = slow.second_moment_mask(*(column.tolist() for column in columns), limit)
    assume(margin > 1e-9)
    assert second_moment_mask(*columns, limit).tolist() == expected


def test_only_tokens_that_move_away_are_dropped() -> None:
    old, behaviour = torch.tensor([-2.5, -2.5, -1.0, -1.0]), torch.full((4,), -1.0)
    away = second_moment_mask(old, behaviour, torch.tensor([-1.0, 1.0, 1.0, -1.0]), 0.04)
    assert away.tolist() == [False, True, True, True]


def test_m2po_drops_the_masked_tokens_and_without_a_mask_none() -> None:
    policies = _policies([3], 0)
    kept = torch.tensor([True, False, True])
    masked = CORRECTIONS["m2po", "behaviour"](replace(policies, is_kept=kept), Limits())
    _is_close(masked, policies.behaviour.tolist(), [1.0, 0.0, 1.0])
    _is_close(CORRECTIONS["m2po", "behaviour"](policies, Limits()), policies.behaviour.tolist(), [1.0] * 3)


def test_a_sequence_that_drifted_as_a_whole_is_dropped_and_one_wild_token_is_truncated() -> None:
    policies = replace(
        _policies([2, 2], 0),
        old=torch.zeros(4, dtype=torch.float64),
        behaviour=-torch.log(torch.tensor([10.0, 0.2, 6.0, 7.0], dtype=torch.float64)),
    )
    weights = CORRECTIONS["seq_mask_tis", "old"](policies, Limits()).weights
    assert weights.tolist() == pytest.approx([5.0, 0.5, 0.0, 0.0])


def test_the_mean_log_ratio_of_a_sequence_is_bounded_after_the_mean_and_not_before() -> None:
    log_ratios = torch.tensor([-60.0, 30.0, 30.0], dtype=torch.float64)  # their mean is 0; of the bounded ones, 20 / 3
    policies = replace(_policies([3], 0), old=log_ratios, behaviour=torch.zeros(3, dtype=torch.float64))
    assert CORRECTIONS["seq_mask_tis", "old"](policies, Limits(0.5, 5.0)).weights.tolist() == [0.5, 5.0, 5.0]


def test_the_approximated_proximal_policy_of_tokens_that_are_as_new_as_the_learner_is_the_current_one() -> None:
    policies = replace(
        _policies([3], 0),
        behaviour=torch.full((3,), -1.0),
        current=torch.full((3,), -3.0),
        versions_apart=torch.tensor([0, 1, 4]),
    )
    corrected = CORRECTIONS["decoupled", "old"](policies, Limits(is_approximated=True))
    assert corrected.anchor.tolist() == [-3.0, -1.0, -2.5]
    assert corrected.weights.tolist() == pytest.approx([math.exp(-2), 1.0, math.exp(-1.5)])
