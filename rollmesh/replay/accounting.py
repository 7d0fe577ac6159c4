"""The accounting of a run: where every group ended, why, and that no group was used twice.

`account` reads the ledger and nothing else. The coordinator therefore writes the accounting when it ends, and the
launcher writes it where the coordinator could not.
"""

from __future__ import annotations

import enum
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rollmesh.replay.ledger import Ledger
from rollmesh.types import GroupState, RunState

VARYING = "…"
"""Stands for the words in which sentences of one kind differ."""


class EndState(enum.Enum):
    """How a run ended, in its accounting."""

    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @classmethod
    def of(cls, state: RunState) -> EndState:
        """The end of a run whose coordinator ends in ``state``."""
        return {RunState.FINISHED: cls.COMPLETED, RunState.FAILED: cls.FAILED}.get(state, cls.INTERRUPTED)


async def account(ledger: Ledger) -> dict[str, Any]:
    """Go through all rows of the ledger once. O(groups).

    Returns:
        ``num_opened``; ``num_groups`` by state; ``num_trained`` (TRAINED or RETIRED); ``num_steps``; ``num_retried``
        (groups of more than one attempt); ``pass_rate``, what part of the trained and FILTERED groups was trained (1
        where there are none); ``reasons`` of FAILED and FILTERED groups with their numbers; ``num_duplicate_prompts``
        and ``num_gaps`` in the line, which are 0 in a sound run; ``is_balanced`` (both are, and every group ended).
    """
    states: Counter[GroupState] = Counter()
    reasons = ReasonCounter()
    prompts: set[str] = set()
    sequences: set[int] = set()
    steps: set[int] = set()
    num_rows = num_retried = 0
    async for row in ledger.rows():
        num_rows += 1
        states[row.state] += 1
        prompts.add(str(row.prompt_id))
        sequences.add(row.sequence)
        num_retried += row.attempt > 0
        if row.state in (GroupState.FAILED, GroupState.FILTERED):
            reasons.add(row.reason)
        if row.step is not None and row.state in (GroupState.TRAINED, GroupState.RETIRED):
            steps.add(row.step)
    num_trained = states[GroupState.TRAINED] + states[GroupState.RETIRED]
    num_decided = num_trained + states[GroupState.FILTERED]
    num_ended = num_decided + states[GroupState.FAILED]
    num_gaps = len(set(range(num_rows)) - sequences)
    return {
        "num_opened": num_rows,
        "num_groups": {state.value: states[state] for state in GroupState},
        "num_trained": num_trained,
        "num_steps": len(steps),
        "num_retried": num_retried,
        "pass_rate": num_trained / num_decided if num_decided else 1.0,
        "reasons": reasons.most_common(),
        "num_duplicate_prompts": num_rows - len(prompts),
        "num_gaps": num_gaps,
        "is_balanced": num_ended == num_rows == len(prompts) and num_gaps == 0,
    }


async def most_frequent_failure(ledger: Ledger) -> str:
    """The reason that most FAILED groups carry, with their number; empty if none failed."""
    reasons = ReasonCounter()
    async for row in ledger.rows(GroupState.FAILED):
        reasons.add(row.reason)
    if not reasons.total:
        return ""
    reason, count = next(iter(reasons.most_common().items()))
    return f"{reason} ({count} of {reasons.total} failed groups)"


def write_accounting(path: Path, books: dict[str, Any]) -> None:
    """Write the accounting as JSON. A reader finds the file that was there before or the whole new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(books, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class ReasonCounter:
    """Counts reasons. Two are alike if they have the same words, where a word with a digit in it is like any other.

    Keeps one sentence for each kind, whatever the number of groups.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._words: dict[str, list[str]] = {}

    def add(self, reason: str) -> None:
        words = reason.split()
        kind = " ".join(VARYING if re.search(r"\d", word) else word for word in words)
        known = self._words.setdefault(kind, words)
        self._words[kind] = [old if old == new else VARYING for old, new in zip(known, words, strict=True)]
        self._counts[kind] += 1

    @property
    def total(self) -> int:
        return self._counts.total()

    def most_common(self) -> dict[str, int]:
        """Number of groups by reason, the most frequent first; what differs within a reason is `VARYING`."""
        return {" ".join(self._words[kind]): count for kind, count in self._counts.most_common()}
