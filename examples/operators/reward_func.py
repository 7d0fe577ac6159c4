"""Reward of the operators task: 1 where the last try is right and the answer ends properly, else 0.

The contract is OpenRLHF's: lists of equal length come in, a dict goes out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from task import is_solved, parse_prompt


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """``queries`` are prompt and response together; the label (the target) is in the prompt too and is not needed."""
    rewards, num_tries = [], []
    for query, prompt in zip(queries, prompts, strict=True):
        answer = query[len(prompt) :]
        rewards.append(float(is_solved(parse_prompt(prompt), answer)))
        num_tries.append(float(answer.count(";") + 1))
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"tries": num_tries}}
