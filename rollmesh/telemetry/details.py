"""Metrics whose names come from the data: one for each data source, and one for each further number of a reward server.

::

    samples ──► Details ──► "source/gsm8k/reward": 0.5, "source/gsm8k/score": 0.5, "source/gsm8k/count": 64,
                            "extra/tries": 1.75, "extra/tries/count": 64

Means and counts are kept as sums, so that the details of several ranks add up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Self

MAX_NAMES = 256
"""Names that are kept, in alphabetical order; a reward function that invents names without end fills no disk."""

_logger = logging.getLogger(__name__)


class Details:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add_sample(self, datasource: str, reward: float, score: float, extra_logs: Mapping[str, float]) -> None:
        """Count one sample. An empty ``datasource`` stands for none."""
        if datasource:
            self._add(f"source/{datasource}/reward", reward, 1)
            self._add(f"source/{datasource}/score", score, 1)
        for name, value in extra_logs.items():
            self._add(f"extra/{name}", value, 1)

    def to_json(self) -> bytes:
        """For `from_json` in another process."""
        return json.dumps(self._sums).encode()

    @classmethod
    def merged(cls, parts: Iterable[bytes]) -> Self:
        """The details of all ``parts``, which `to_json` gave."""
        total = cls()
        for part in parts:
            for name, (value, count) in json.loads(part).items():
                total._add(name, value, count)
        return total

    def metrics(self) -> dict[str, float]:
        """A mean for each name, and a count for each data source and each further number."""
        names = sorted(self._sums)
        if len(names) > MAX_NAMES:
            _logger.warning("metrics have %d names of the data's and the reward's, kept are %d", len(names), MAX_NAMES)
        found = {}
        for name in names[:MAX_NAMES]:
            total, count = self._sums[name]
            found[name] = total / count
            found[f"{name.removesuffix('/score')}/count"] = float(count)
        return {name: value for name, value in found.items() if not name.endswith("/reward/count")}

    def _add(self, name: str, value: float, count: int) -> None:
        total, number = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, number + count)
