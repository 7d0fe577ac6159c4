"""The reward of the operators task: 1 if the last try is right and the answer ends properly, else 0.

The contract is OpenRLHF's: the function takes lists of equal length and returns a dict.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from task import is_solved, parse_prompt


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Return a reward and a score for each answer, and the number of tries as an extra log.

    Args:
        queries: the texts of prompt and response together.
        prompts: the texts of the prompts.
        labels: the targets. They are not used, because a prompt contains its target.
    """
    rewards, num_tries = [], []
    for query, prompt in zip(queries, prompts, strict=True):
        answer = query[len(prompt) :]
        rewards.append(float(is_solved(parse_prompt(prompt), answer)))
        num_tries.append(float(answer.count(";") + 1))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"tries": num_tries}}
