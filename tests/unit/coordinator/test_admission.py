"""How many groups are opened, against a slow model of a run."""

from __future__ import annotations

import random

from rollmesh.types import GroupState
from services.coordinator.admission import SUCCEEDED, Admission, failed_too_often

PENDING, READY, TRAINED, FAILED, FILTERED = (
    GroupState.PENDING,
    GroupState.READY,
    GroupState.TRAINED,
    GroupState.FAILED,
    GroupState.FILTERED,
)


def test_the_slots_bound_what_is_open() -> None:
    admission = Admission(num_slots=8, groups_per_batch=4, steps=10, num_prompts=100)
    assert admission.num_to_open({}, 0, 0) == 8
    assert admission.num_to_open({PENDING: 3, READY: 5}, 8, 8) == 0
    assert admission.num_to_open({PENDING: 3, TRAINED: 5}, 8, 5) == 3


def test_no_more_is_opened_than_the_steps_need_and_failures_are_replaced() -> None:
    admission = Admission(num_slots=8, groups_per_batch=4, steps=2, num_prompts=100)
    assert admission.num_to_open({TRAINED: 4, PENDING: 4}, 8, 4) == 0
    assert admission.num_to_open({TRAINED: 4, PENDING: 2, FAILED: 1, FILTERED: 1}, 8, 2) == 2


def test_the_dataset_bounds_what_can_be_opened() -> None:
    admission = Admission(num_slots=8, groups_per_batch=4, steps=10, num_prompts=6)
    assert (admission.num_wanted, admission.num_steps) == (6, 2)
    assert admission.num_to_open({}, 0, 0) == 6
    assert admission.num_to_open({FAILED: 6}, 6, 0) == 0


def test_the_intake_stays_open_while_a_group_may_still_fail_and_be_replaced() -> None:
    admission = Admission(num_slots=4, groups_per_batch=4, steps=1, num_prompts=100)
    assert not admission.is_complete({READY: 3, GroupState.LEASED: 1}, 4)
    assert admission.is_complete({READY: 4}, 4)
    assert Admission(4, 4, 1, 4).is_complete({PENDING: 4}, 4), "no prompt is left to replace it with"


def test_every_random_run_ends_with_what_was_wanted_or_with_the_dataset_used_up() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        admission = Admission(
            num_slots=rng.randint(2, 9),
            groups_per_batch=rng.randint(1, 2),
            steps=rng.randint(1, 8),
            num_prompts=rng.randint(1, 20),
        )
        counts, num_opened = dict.fromkeys(GroupState, 0), 0
        for _ in range(500):
            num_used = counts[PENDING] + counts[READY]
            opening = admission.num_to_open(counts, num_opened, num_used)
            assert num_used + opening <= admission.num_slots
            counts[PENDING] += opening
            num_opened += opening
            if admission.is_complete(counts, num_opened):
                assert admission.num_to_open(counts, num_opened, 0) == 0
            if counts[PENDING] and rng.random() < 0.6:
                counts[PENDING] -= 1
                counts[rng.choice([READY, READY, FAILED, FILTERED])] += 1
            elif counts[READY]:
                counts[READY] -= 1
                counts[TRAINED] += 1
        num_succeeded = sum(counts[state] for state in SUCCEEDED)
        assert admission.is_complete(counts, num_opened)
        wanted = admission.steps * admission.groups_per_batch
        assert num_succeeded == wanted or (num_opened == admission.num_prompts and num_succeeded < wanted)


def test_a_run_that_reached_its_steps_or_did_not_use_up_its_prompts_is_short_of_nothing() -> None:
    admission = Admission(num_slots=8, groups_per_batch=4, steps=3, num_prompts=100)
    assert admission.shortfall({GroupState.RETIRED: 12, FILTERED: 50}) == ""
    assert admission.shortfall({GroupState.RETIRED: 8, TRAINED: 4, FAILED: 88}) == ""
    assert admission.shortfall({GroupState.RETIRED: 8, FAILED: 1}) == ""


def test_a_run_whose_prompts_were_used_up_says_by_how_much() -> None:
    admission = Admission(num_slots=8, groups_per_batch=4, steps=10, num_prompts=30)
    assert admission.shortfall({GroupState.RETIRED: 17, FILTERED: 12, FAILED: 1}) == (
        "the prompts were used up after 5 of 10 steps: of 30, 17 were trained, 12 filtered and 1 failed; the run "
        "needs 2.4 times as many prompts: raise training.epochs, or lower training.steps"
    )
    assert admission.shortfall({FILTERED: 30}) == (
        "the prompts were used up after 0 of 10 steps: of 30, 0 were trained, 30 filtered and 0 failed; "
        "accounting.json has the reasons"
    )


def test_a_run_fails_only_with_a_batch_of_failures_that_are_a_large_part() -> None:
    assert not failed_too_often({FAILED: 3}, 0.1, groups_per_batch=4)
    assert failed_too_often({FAILED: 4}, 0.1, groups_per_batch=4)
    assert failed_too_often({FAILED: 4, TRAINED: 30}, 0.1, groups_per_batch=4)
    assert not failed_too_often({FAILED: 4, TRAINED: 36}, 0.1, groups_per_batch=4)
