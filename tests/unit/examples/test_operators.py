"""The operators task: its rules, its reward and its teacher."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path("examples/operators").resolve()))
from reward_func import reward_func
from task import (
    CHOICES,
    MAX_ANSWER_TOKENS,
    VOCABULARY,
    Problem,
    draw_problems,
    is_solved,
    parse_prompt,
    possible_tries,
    teacher_answer,
)

PROBLEM = Problem((7, 7, 1), 15)


def test_the_vocabulary_has_sixty_four_words() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 64


def test_a_prompt_is_read_back_to_its_problem() -> None:
    assert PROBLEM.prompt == "<bos> 7 ? 7 ? 1 = 15 :"
    assert parse_prompt(PROBLEM.prompt) == PROBLEM


def test_a_text_that_is_no_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="not an operators problem"):
        parse_prompt("<bos> 7 + 7 = 14")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("7 + 7 = 14 + 1 = 15 ok <eos>", True),
        ("7 + 7 = 14 - 1 = 13 no ; 7 + 7 = 14 + 1 = 15 ok <eos>", True),
        ("7 + 7 = 14 + 1 = 15 no <eos>", True),  # the verdict word is not rewarded
        ("7 + 7 = 14 + 1 = 15 ok", False),  # does not end
        ("7 + 7 = 14 + 1 = 15 ok ; 7 + 7 = 14 - 1 = 13 no <eos>", False),  # the last try counts
        ("7 + 7 = 15 + 1 = 15 ok <eos>", False),  # wrong first step
        ("7 * 7 = 49 / 1 = 15 ok <eos>", False),  # operator not allowed
        ("7 - 7 = 0 + 1 = 1 no <eos>", False),
        ("1 + 7 = 8 + 7 = 15 ok <eos>", False),  # other numbers
        ("15 ok <eos>", False),
        ("<eos>", False),
        ("", False),
    ],
)
def test_the_last_try_decides(answer: str, expected: bool) -> None:
    assert is_solved(PROBLEM, answer) is expected


def test_results_out_of_range_are_no_tries() -> None:
    tries = list(possible_tries((9, 9, 9)))
    assert all(0 <= result <= 50 for attempt in tries for result in attempt.results)
    assert len(tries) < len(CHOICES)


def test_held_out_problems_are_never_trained_on() -> None:
    train = draw_problems(random.Random(0), 300, is_held_out=False)
    held_out = draw_problems(random.Random(0), 100, is_held_out=True)
    assert not set(train) & set(held_out)
    assert all(len({t.results[1] for t in problem.tries}) >= 3 for problem in train + held_out)


def test_the_teacher_is_right_in_arithmetic_and_gives_up_early() -> None:
    rng = random.Random(3)
    problems = draw_problems(rng, 400, is_held_out=False)
    answers = [teacher_answer(problem, rng) for problem in problems]
    assert max(len(answer.split()) for answer in answers) <= MAX_ANSWER_TOKENS
    solved = sum(is_solved(problem, answer) for problem, answer in zip(problems, answers, strict=True))
    assert 0.2 < solved / len(problems) < 0.5


def test_the_reward_function_keeps_openrlhfs_contract() -> None:
    prompts = [PROBLEM.prompt] * 2
    queries = [f"{PROBLEM.prompt} 7 + 7 = 14 + 1 = 15 ok <eos>", f"{PROBLEM.prompt} 7 - 7 = 0 + 1 = 1 no <eos>"]
    result = reward_func(queries, prompts, ["15", "15"])
    assert result["rewards"] == [1.0, 0.0]
    assert set(map(len, [result["scores"], *result["extra_logs"].values()])) == {2}
