"""The experience: sequences and columns, from groups."""

from dataclasses import replace

import pytest

from rollmesh.errors import ReplayError
from rollmesh.types import Group, PolicyVersion, StopReason, VersionSpan
from services.learner.experience import Experience, build_experience
from tests.unit.learner.samples import group, sample


def _build(*groups: Group, needs_reference: bool = False) -> Experience:
    return build_experience([groups], needs_reference)


def test_only_generated_tokens_are_trained_in_a_sample_of_several_turns() -> None:
    many = sample(
        0,
        prompt=[1, 2],
        response=[10, 11, 90, 91, 12, 92],
        turns=[(2, 2), (1, 1)],
        behaviour=[-1.0, -2.0, -3.0],
        reference=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    )
    experience = _build(group([many, sample(1, reference=[0.0] * 3)]), needs_reference=True)
    sequence = experience.sequences[0]
    assert sequence.positions.tolist() == [2, 3, 6]
    assert sequence.token_ids[sequence.positions].tolist() == [10, 11, 12]
    assert experience.reference is not None
    assert experience.reference.tolist() == [0.0, 1.0, 4.0, 0.0, 0.0, 0.0]
    assert experience.trajectories.offsets.tolist() == [0, 1, 4, 0, 1, 2]
    assert experience.behaviour[:3].tolist() == [-1.0, -2.0, -3.0]


def test_an_aborted_sample_is_left_out() -> None:
    aborted = sample(0, reward=100.0, stop=StopReason.ABORTED)
    experience = _build(group([aborted, sample(1, reward=1.0), sample(2, reward=0.0)]))
    assert [s.index for s in experience.samples_by_group[0]] == [1, 2]
    assert experience.trajectories.rewards.tolist() == [1.0, 0.0]
    assert experience.trajectories.groups.lengths.tolist() == [2]


def test_a_sample_without_generated_tokens_counts_for_its_group_but_is_not_trained() -> None:
    silent = sample(0, response=[90], turns=[(0, 1)], reward=0.0)
    experience = _build(group([silent, sample(1, reward=1.0)]))
    assert len(experience.sequences) == 1
    assert experience.trajectories.tokens.lengths.tolist() == [0, 3]
    assert experience.trajectories.rewards.tolist() == [0.0, 1.0]
    assert experience.sequence_starts == [0]


def test_every_token_has_the_version_that_generated_it_and_the_sample_the_oldest() -> None:
    mixed = replace(
        sample(0), version_spans=(VersionSpan(PolicyVersion(0, 3), 0, 1), VersionSpan(PolicyVersion(0, 5), 1, 2))
    )
    experience = _build(group([mixed, sample(1, version=4)]))
    assert experience.version_numbers.tolist() == [3, 5, 5, 4, 4, 4]
    assert experience.trajectories.versions.tolist() == [3, 4]


def test_the_shares_of_the_steps_lie_one_after_another() -> None:
    silent = sample(1, response=[90], turns=[(0, 1)])
    shares = build_experience(
        [[group([sample(0), silent])], [], [group([sample(0)], 1), group([sample(0)], 2)]], False
    ).step_shares
    assert [share.sequences for share in shares] == [slice(0, 1), slice(1, 1), slice(1, 3)]
    assert [share.columns for share in shares] == [slice(0, 3), slice(3, 3), slice(3, 9)]
    assert [share.tokens.lengths.tolist() for share in shares] == [[3, 0], [], [3, 3]]
    assert [share.groups.lengths.tolist() for share in shares] == [[2], [], [1, 1]]


@pytest.mark.parametrize(
    ("broken", "needs_reference", "message"),
    [
        (sample(reward=None), False, "has no score"),
        (sample(prompt=[]), False, "empty prompt"),
        (sample(behaviour=[-1.0]), False, "1 behaviour log-probabilities for 3"),
        (replace(sample(), version_spans=()), False, "version spans of 0 tokens for 3"),
        (sample(), True, "algorithm.kl.coef"),
        (sample(reference=[-1.0]), True, "algorithm.kl.coef"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named(broken: object, needs_reference: bool, message: str) -> None:
    with pytest.raises(ReplayError, match=message) as caught:
        _build(group([broken]), needs_reference=needs_reference)  # type: ignore[list-item]
    assert "train:0:0/0/0" in str(caught.value)


def test_no_groups_are_no_problem() -> None:
    experience = build_experience([[], []], needs_reference=True)
    assert (len(experience.sequences), experience.num_tokens, len(experience.step_shares)) == (0, 0, 2)
    assert experience.reference is not None
