"""Metrics whose names come from the data: for each data source, and for each further number of a reward server.

::

    samples ──► Details ──► "source/gsm8k/reward": 0.5, "source/gsm8k/score": 0.5, "source/gsm8k/count": 64,
                            "extra/tries": 1.75, "extra/tries/count": 64

The details hold sums and counts, so that the details of several ranks can be added up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Self

MAX_NAMES = 256
"""The number of names that are kept, the first in alphabetical order.

The bound keeps a reward function that invents ever new names from filling the disk.
"""

_logger = logging.getLogger(__name__)


class Details:
    """Sums and counts of numbers, by the name that comes from the data."""

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
        """Return the details as JSON for `merged`, which another process may call."""
        return json.dumps(self._sums).encode()

    @classmethod
    def merged(cls, parts: Iterable[bytes]) -> Self:
        """Return the sum of the details ``parts``, each as `to_json` returned it."""
        total = cls()
        for part in parts:
            for name, (value, count) in json.loads(part).items():
                total._add(name, value, count)
        return total

    def metrics(self) -> dict[str, float]:
        """Return a mean for each name, and a count for each data source and each further number."""
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
