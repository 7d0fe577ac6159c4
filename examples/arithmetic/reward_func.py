"""Reward of the arithmetic example: 1 where the last number of the answer is right, else 0.

The contract is OpenRLHF's: lists of equal length come in, a dict goes out. The judge is reasoning-gym's own.
"""

from __future__ import annotations

import json
import re
from typing import Any

from reasoning_gym import get_score_answer_fn

NUMBER = re.compile(r"-?\d+")


def last_number(text: str) -> str:
    """``The answer is 1,024.`` gives ``1024``; a text without numbers gives an empty string."""
    return (NUMBER.findall(text.replace(",", "")) or [""])[-1]


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """``queries`` are prompt and response together; a label holds a task's right answer and its metadata, as JSON."""
    rewards, lengths = [], []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        response, entry = query[len(prompt) :], json.loads(label)
        judge = get_score_answer_fn(entry["metadata"]["source_dataset"])
        # The judge gives part of the score to a right number inside a longer text; only the whole score counts here.
        rewards.append(float(judge(last_number(response), entry) == 1.0))
        lengths.append(float(len(response)))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"characters": lengths}}
