"""Reasons of groups that ended without training, put together: sentences that differ in their numbers alone are one."""

from __future__ import annotations

import re
from collections import Counter

VARYING = "…"


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
