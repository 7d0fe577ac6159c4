"""From groups to sequences."""

import pytest

from rollmesh.algorithms.registry import ALGORITHMS
from rollmesh.errors import ReplayError
from rollmesh.types import Group, StopReason
from services.learner.experience import Experience, build_experience
from tests.unit.learner.samples import group, sample


def _build(*groups: Group, needs_reference: bool = False) -> Experience:
    return build_experience(groups, ALGORITHMS["grpo"], needs_reference)


def test_only_generated_tokens_are_trained_in_a_sample_of_several_turns() -> None:
    many = sample(
        0,
        prompt=[1, 2],
        response=[10, 11, 90, 91, 12, 92],
        turns=[(2, 2), (1, 1)],
        behaviour=[-1.0, -2.0, -3.0],
        reference=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    )
    sequence = _build(group([many, sample(1, reference=[0.0] * 3)]), needs_reference=True).sequences[0]
    assert sequence.positions.tolist() == [2, 3, 6]
    assert sequence.token_ids[sequence.positions].tolist() == [10, 11, 12]
    assert sequence.reference_logprobs is not None
    assert sequence.reference_logprobs.tolist() == [0.0, 1.0, 4.0]


def test_advantages_are_those_of_the_sample_s_own_group() -> None:
    experience = _build(
        group([sample(0, reward=1.0), sample(1, reward=0.0)], 0),
        group([sample(0, reward=0.0), sample(1, reward=0.0), sample(2, reward=0.9)], 1),
    )
    advantages = [sequence.advantage for sequence in experience.sequences]
    assert advantages == pytest.approx([0.7071, -0.7071, -0.5774, -0.5774, 1.1547], abs=1e-4)


def test_an_aborted_sample_leaves_the_baseline_too() -> None:
    aborted = sample(0, reward=100.0, stop=StopReason.ABORTED)
    experience = _build(group([aborted, sample(1, reward=1.0), sample(2, reward=0.0)]))
    assert [s.advantage for s in experience.sequences] == pytest.approx([0.7071, -0.7071], abs=1e-4)
    assert [s.index for s in experience.groups[0]] == [1, 2]


def test_a_sample_without_generated_tokens_counts_for_the_baseline_but_is_not_trained() -> None:
    silent = sample(0, response=[90], turns=[(0, 1)], reward=0.0)
    experience = _build(group([silent, sample(1, reward=1.0)]))
    assert len(experience.sequences) == 1
    assert experience.sequences[0].advantage == pytest.approx(0.7071, abs=1e-4)
    assert experience.num_generated_tokens == 3


@pytest.mark.parametrize(
    ("broken", "needs_reference", "message"),
    [
        (sample(reward=None), False, "has no score"),
        (sample(prompt=[]), False, "empty prompt"),
        (sample(behaviour=[-1.0]), False, "1 behaviour log-probabilities for 3"),
        (sample(), True, "algorithm.kl.coef"),
        (sample(reference=[-1.0]), True, "algorithm.kl.coef"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named(broken: object, needs_reference: bool, message: str) -> None:
    with pytest.raises(ReplayError, match=message) as caught:
        _build(group([broken]), needs_reference=needs_reference)  # type: ignore[list-item]
    assert "train:0:0/0/0" in str(caught.value)


def test_no_groups_are_no_problem() -> None:
    assert _build() == Experience((), ())
