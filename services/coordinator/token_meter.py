"""The speed of generation in the whole mesh, as `rollmesh status` shows it."""

from __future__ import annotations

from collections import deque

from services.coordinator.members import Clock

WINDOW_S = 10.0
"""Seconds over which the speed is measured."""


class TokenMeter:
    """Generated tokens per second over the last `WINDOW_S`, from a running total.

    A pause that fills the whole window, such as the time before the first token, does not lower the speed after the
    pause: constant generation gives the same speed from its first seconds on. Totals of 0, 100 and 200 tokens, one
    second apart, give 100 tokens per second.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._totals: deque[tuple[float, int]] = deque()

    def observe(self, num_tokens: int) -> None:
        """Record the running total of generated tokens at this moment."""
        now = self._clock()
        if self._totals and self._totals[0][1] == num_tokens:
            self._totals.clear()
        self._totals.append((now, num_tokens))
        while len(self._totals) > 2 and self._totals[1][0] <= now - WINDOW_S:
            self._totals.popleft()

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second between the first and the last total in the window; 0 before the second total."""
        if len(self._totals) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._totals[0], self._totals[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0
