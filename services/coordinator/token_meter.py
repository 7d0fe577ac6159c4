"""The speed of generation in the whole mesh, as `rollmesh status` shows it."""

from __future__ import annotations

from collections import deque

from services.coordinator.members import Clock

WINDOW_S = 10.0


class TokenMeter:
    """Generated tokens per second over the last `WINDOW_S`, from a running total.

    A pause that fills the whole window, such as the time before the first tokens, is no part of the speed after it:
    constant generation reads the same from its first seconds on.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._totals: deque[tuple[float, int]] = deque()

    def observe(self, num_tokens: int) -> None:
        now = self._clock()
        if self._totals and self._totals[0][1] == num_tokens:
            self._totals.clear()
        self._totals.append((now, num_tokens))
        while len(self._totals) > 2 and self._totals[1][0] <= now - WINDOW_S:
            self._totals.popleft()

    @property
    def tokens_per_s(self) -> float:
        if len(self._totals) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._totals[0], self._totals[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0
