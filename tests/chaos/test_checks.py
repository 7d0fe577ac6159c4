"""The checks of a run that was hit see what they are for, and the plan covers every cell once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from rollmesh.types import PolicyVersion, VersionSpan
from tests.chaos.checks import check_batches, check_versions
from tests.chaos.matrix import HITS_PER_RUN, MOMENTS, TARGETS, all_cells, part, plan
from tests.unit.learner.samples import random_groups


def test_a_prompt_in_two_batches_and_a_batch_that_is_missing_are_seen() -> None:
    batches = [random_groups(2, 2, first_prompt=first) for first in (0, 2, 4)]
    check_batches(batches, 3, 2)
    with pytest.raises(AssertionError, match=r"trained twice: .*train:0:1"):
        check_batches([batches[0], [batches[1][0], batches[0][1]], batches[2]], 3, 2)
    with pytest.raises(AssertionError):
        check_batches(batches[:2], 3, 2)


def test_a_sample_whose_later_tokens_have_an_older_version_is_seen() -> None:
    (group,) = random_groups(1, 1)
    spans = (VersionSpan(PolicyVersion(0, 2), 0, 1), VersionSpan(PolicyVersion(0, 1), 1, 1))
    wrong = replace(group, samples=(replace(group.samples[0], version_spans=spans),))
    with pytest.raises(AssertionError):
        check_batches([[wrong]], 1, 1)


def test_a_version_number_that_is_used_again_is_seen() -> None:
    check_versions([PolicyVersion(0, 1), PolicyVersion(0, 2), PolicyVersion(1, 3)])
    with pytest.raises(AssertionError):
        check_versions([PolicyVersion(0, 2), PolicyVersion(1, 2)])
    with pytest.raises(AssertionError):
        check_versions([PolicyVersion(1, 2), PolicyVersion(0, 3)])


def test_the_plan_makes_every_hit_once_and_hits_no_process_of_a_run_twice() -> None:
    runs = plan(all_cells(), seed=1)
    assert sorted(map(str, (hit.cell for run in runs for hit in run))) == sorted(map(str, all_cells()))
    assert len(all_cells()) == len(TARGETS) * len(MOMENTS)
    for run in runs:
        assert len(run) <= HITS_PER_RUN
        assert len({hit.cell.target for hit in run}) == len(run)
        assert all(earlier.after_step < later.after_step for earlier, later in itertools.pairwise(run))
    assert plan(all_cells(), seed=1) == runs


def test_a_seed_chooses_the_same_part_of_the_matrix_again() -> None:
    assert part(3, 20) == part(3, 20)
    assert part(3, 20) != part(4, 20)
    assert len(set(part(3, 20))) == 20
