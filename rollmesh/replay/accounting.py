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
    """Go through the rows of the ledger once, and add its totals of the groups that have no row any more. O(rows).

    Returns:
        ``num_opened``; ``num_groups`` by state; ``num_trained`` (TRAINED or RETIRED); ``num_steps``; ``num_retried``
        (groups of more than one attempt); ``pass_rate``, what part of the trained and FILTERED groups was trained (1
        where there are none); ``reasons`` of FAILED and FILTERED groups with their numbers; ``num_duplicate_prompts``
        and ``num_gaps`` in the line, which are 0 in a sound run; ``is_balanced`` (both are, every group ended, and the
        places of all groups sum up to what the places of a line without gaps do).
    """
    totals = await ledger.totals()
    states = Counter(totals.num_compacted)
    reasons = ReasonCounter()
    for _, reason, count in totals.reasons:
        reasons.add(reason, count)
    prompts: set[str] = set()
    num_rows, num_retried, sequence_sum = 0, totals.num_retried, totals.sequence_sum
    async for row in ledger.rows():
        num_rows += 1
        states[row.state] += 1
        prompts.add(str(row.prompt_id))
        sequence_sum += row.sequence
        num_retried += row.attempt > 0
        if row.state in (GroupState.FAILED, GroupState.FILTERED):
            reasons.add(row.reason)
    num_opened = totals.num_opened
    num_trained = states[GroupState.TRAINED] + states[GroupState.RETIRED]
    num_decided = num_trained + states[GroupState.FILTERED]
    num_ended = num_decided + states[GroupState.FAILED]
    num_duplicates, num_gaps = num_rows - len(prompts), num_opened - states.total()
    is_dense = num_duplicates == num_gaps == 0 and 2 * sequence_sum == num_opened * (num_opened - 1)
    return {
        "num_opened": num_opened,
        "num_groups": {state.value: states[state] for state in GroupState},
        "num_trained": num_trained,
        "num_steps": totals.num_steps,
        "num_retried": num_retried,
        "pass_rate": num_trained / num_decided if num_decided else 1.0,
        "reasons": reasons.most_common(),
        "num_duplicate_prompts": num_duplicates,
        "num_gaps": num_gaps,
        "is_balanced": is_dense and num_ended == num_opened,
    }


async def most_frequent_failure(ledger: Ledger) -> str:
    """The reason that most FAILED groups carry, with their number; empty if none failed."""
    reasons = ReasonCounter()
    for state, reason, count in (await ledger.totals()).reasons:
        if state is GroupState.FAILED:
            reasons.add(reason, count)
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

    def add(self, reason: str, count: int = 1) -> None:
        words = reason.split()
        kind = " ".join(VARYING if re.search(r"\d", word) else word for word in words)
        known = self._words.setdefault(kind, words)
        self._words[kind] = [old if old == new else VARYING for old, new in zip(known, words, strict=True)]
        self._counts[kind] += count

    @property
    def total(self) -> int:
        return self._counts.total()

    def most_common(self) -> dict[str, int]:
        """Number of groups by reason, the most frequent first; what differs within a reason is `VARYING`."""
        return {" ".join(self._words[kind]): count for kind, count in self._counts.most_common()}
