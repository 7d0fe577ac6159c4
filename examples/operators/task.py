"""The "operators" task: find two operators so that ``a ? b ? c``, evaluated left to right, gives a target.

A problem reads ``<bos> 7 ? 7 ? 1 = 15 :``. The answer is a line of tries, and the last try counts::

    7 + 7 = 14 - 1 = 13 no ; 7 + 7 = 14 + 1 = 15 ok <eos>

This module has the rules and needs no model: problems, the text of a try, and the judgement of an answer.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

OPERATORS = ("+", "-", "*")
CHOICES = tuple((first, second) for first in OPERATORS for second in OPERATORS)
"""The pairs of operators, in the fixed order in which the teacher tries them."""
LARGEST_NUMBER = 50
MAX_TRIES = 6
TOKENS_PER_TRY = 10
MAX_ANSWER_TOKENS = MAX_TRIES * (TOKENS_PER_TRY + 1)
"""The tokens of six tries, five separators and the end token."""

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
VOCABULARY = (
    PAD,
    BOS,
    EOS,
    *(str(number) for number in range(LARGEST_NUMBER + 1)),
    *("+", "-", "*", "/", "=", ";", "?", ":", "ok", "no"),
)


def apply_operator(left: int, operator: str, right: int) -> int | None:
    """Return the result; None if the result is out of range or the operator is unknown."""
    if operator == "+":
        result = left + right
    elif operator == "-":
        result = left - right
    elif operator == "*":
        result = left * right
    else:
        return None
    return result if 0 <= result <= LARGEST_NUMBER else None


@dataclass(frozen=True)
class Try:
    """One pair of operators with both results, which are in range."""

    numbers: tuple[int, int, int]
    operators: tuple[str, str]
    results: tuple[int, int]

    def text(self, target: int) -> str:
        """Return the try as text, with the verdict "ok" or "no"."""
        (a, b, c), (first, second), (middle, last) = self.numbers, self.operators, self.results
        verdict = "ok" if last == target else "no"
        return f"{a} {first} {b} = {middle} {second} {c} = {last} {verdict}"


@dataclass(frozen=True)
class Problem:
    """Three numbers and the target that two operators between them have to reach."""

    numbers: tuple[int, int, int]
    target: int

    @property
    def prompt(self) -> str:
        """The problem as text."""
        a, b, c = self.numbers
        return f"{BOS} {a} ? {b} ? {c} = {self.target} :"

    @property
    def is_held_out(self) -> bool:
        """Whether the problem is for evaluation only. This holds for about 15 %, chosen by a checksum."""
        return zlib.crc32(f"{self.numbers}={self.target}".encode()) % 1000 < 150

    @cached_property
    def tries(self) -> tuple[Try, ...]:
        """The tries whose results are all in range."""
        return tuple(possible_tries(self.numbers))


def possible_tries(numbers: tuple[int, int, int]) -> Iterator[Try]:
    """Yield the tries whose results are all in range, in the order of `CHOICES`."""
    a, b, c = numbers
    for first, second in CHOICES:
        middle = apply_operator(a, first, b)
        last = None if middle is None else apply_operator(middle, second, c)
        if middle is not None and last is not None:
            yield Try(numbers, (first, second), (middle, last))


def draw_problem(rng: random.Random) -> Problem:
    """Return a random problem whose tries reach at least three different values."""
    while True:
        numbers = (rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9))
        reachable = sorted({attempt.results[1] for attempt in possible_tries(numbers)})
        if len(reachable) >= 3:
            return Problem(numbers, rng.choice(reachable))


def draw_problems(rng: random.Random, count: int, *, is_held_out: bool) -> list[Problem]:
    """Return ``count`` different problems, all held out or all not held out."""
    problems: dict[tuple[tuple[int, int, int], int], Problem] = {}
    while len(problems) < count:
        problem = draw_problem(rng)
        if problem.is_held_out == is_held_out:
            problems.setdefault((problem.numbers, problem.target), problem)
    return list(problems.values())


def parse_prompt(prompt: str) -> Problem:
    """Return the problem in a prompt text.

    Raises:
        ValueError: the text is no problem.
    """
    words = prompt.split()
    if len(words) != 9 or words[0] != BOS or [words[i] for i in (2, 4, 6, 8)] != ["?", "?", "=", ":"]:
        raise ValueError(f"not an operators problem: {prompt!r}")
    return Problem((int(words[1]), int(words[3]), int(words[5])), int(words[7]))


def is_solved(problem: Problem, answer: str) -> bool:
    """Return whether the last try of an answer is right and the answer ends properly.

    The last try is right if its arithmetic is correct, its results are in range and it reaches the target. The word of
    the verdict does not matter.
    """
    words = answer.split()
    if not words or words[-1] != EOS:
        return False
    last = " ".join(words[:-1]).rpartition(";")[2].split()
    if len(last) != TOKENS_PER_TRY or last[3] != "=" or last[7] != "=":
        return False
    a, b, c = problem.numbers
    if (last[0], last[2], last[6]) != (str(a), str(b), str(c)):
        return False
    middle = apply_operator(a, last[1], b)
    result = None if middle is None else apply_operator(middle, last[5], c)
    return result == problem.target and last[4] == str(middle) and last[8] == str(result)


def teacher_answer(problem: Problem, rng: random.Random) -> str:
    """Return an answer of the flawed teacher: its arithmetic and verdicts are right, but it often gives up too early.

    The teacher goes through the tries in their fixed order, cyclically, from a random start. It stops with probability
    0.95 after a right try, and with probability 0.55 after a wrong try.
    """
    start = rng.randrange(len(problem.tries))
    texts: list[str] = []
    for offset in range(MAX_TRIES):
        attempt = problem.tries[(start + offset) % len(problem.tries)]
        texts.append(attempt.text(problem.target))
        if rng.random() < (0.95 if attempt.results[1] == problem.target else 0.55):
            break
    return f"{' ; '.join(texts)} {EOS}"
