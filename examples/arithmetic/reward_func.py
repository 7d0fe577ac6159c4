"""The reward of the arithmetic example: 1 if the last number of the answer is right, else 0.

The contract is OpenRLHF's: the function takes lists of equal length and returns a dict. reasoning-gym is the judge.
"""

from __future__ import annotations

import json
import re
from typing import Any

from reasoning_gym import get_score_answer_fn

NUMBER = re.compile(r"-?\d+")


def last_number(text: str) -> str:
    """Return the last number of a text: ``1024`` for ``The answer is 1,024.``, and an empty string without numbers."""
    return (NUMBER.findall(text.replace(",", "")) or [""])[-1]


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """Return a reward and a score for each answer, and its number of characters as an extra log.

    Args:
        queries: the texts of prompt and response together.
        prompts: the texts of the prompts.
        labels: the right answer and the metadata of each question, as JSON.
    """
    rewards, lengths = [], []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        response, entry = query[len(prompt) :], json.loads(label)
        judge = get_score_answer_fn(entry["metadata"]["source_dataset"])
        # The judge gives a part of the score to a right number in a longer text. Only the whole score counts here.
        rewards.append(float(judge(last_number(response), entry) == 1.0))
        lengths.append(float(len(response)))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"characters": lengths}}
