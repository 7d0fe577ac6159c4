"""The accounting of a run: where every group ended, why, and that no group was used twice.

`account` reads the ledger and nothing else. The coordinator therefore writes the accounting when it ends, and the
launcher writes it where the coordinator could not.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rollmesh.replay.ledger import Ledger
from rollmesh.telemetry.whole_file import write_whole
from rollmesh.types import GroupState, RunState

VARYING = "…"
"""Replaces the words that differ between sentences of one kind."""


class EndState(enum.Enum):
    """How a run ended, in its accounting."""

    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @classmethod
    def of(cls, state: RunState) -> EndState:
        """Return how a run ended whose coordinator ended in ``state``."""
        return {RunState.FINISHED: cls.COMPLETED, RunState.FAILED: cls.FAILED}.get(state, cls.INTERRUPTED)


async def account(ledger: Ledger) -> dict[str, Any]:
    """Return the accounting of a run. Reads each row once, and the totals of the groups that have no row any more.

    Cost: O(rows).

    Returns:
        A dictionary with these entries:

        * ``num_opened``: groups in the run; ``num_groups``: groups in each state.
        * ``num_trained``: groups that are TRAINED or RETIRED; ``num_steps``: steps trained.
        * ``num_retried``: groups that took more than one attempt.
        * ``pass_rate``: the trained part of the groups that were trained or FILTERED; 1 where there are no such groups.
          30 trained and 10 FILTERED groups give 0.75.
        * ``reasons``: of FAILED and FILTERED groups, with the number of groups for each reason.
        * ``num_duplicate_prompts`` and ``num_gaps`` (places of the line without a group); 0 in a sound run.
        * ``is_balanced``: both are 0, every group ended, and the places of all groups have the sum of a line without
          gaps. Four groups stand at the places 0 to 3, whose sum is 6 = 4 · 3 / 2.
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
    """Return the most frequent reason of FAILED groups and its number; an empty text if no group failed."""
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
    """Write the accounting as JSON. A reader finds either the former file or the whole new file.

    Raises:
        OSError: the disk is full, or the folder cannot be written. The former file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(books, indent=2) + "\n")


class ReasonCounter:
    """Counts reasons by kind. Reasons of one kind have the same words, where all words with a digit are alike.

    "lease of rollout-1 expired" and "lease of rollout-2 expired" are of one kind: "lease of … expired". The counter
    keeps one sentence for each kind, whatever the number of groups.
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
        """Return the number of groups of each kind, the most frequent first. `VARYING` is for words that differ."""
        return {" ".join(self._words[kind]): count for kind, count in self._counts.most_common()}
