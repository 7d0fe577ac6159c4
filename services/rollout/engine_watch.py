"""Notices that an engine has died, or that it makes no tokens although samples wait for tokens.

::

    engine alive? ──no──► StartAgainError ──► the worker leaves, and its process ends with EXIT_START_AGAIN
        │ yes
    samples in the engine, no load under way, and no new token for the stall timeout? ──yes──► StartAgainError

An engine that hangs still answers questions about its health. Therefore only new tokens count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from rollmesh.errors import StartAgainError
from services.rollout.engine import Engine

POLL_S = 0.5
"""Time between two looks at the engine."""
STALL_MARGIN_S = 30.0
"""Time that a worker whose engine stands still asks of the coordinator beyond the stall timeout. Within this time the
worker replaces itself, and the coordinator does not fail the run."""


class EngineWatch:
    """Watches one engine. Belongs to the running event loop.

    Args:
        engine: the engine.
        num_waiting: returns the number of samples that wait for tokens of the engine.
        is_loading: returns whether the engine loads weights. The load has a deadline of its own.
        stall_timeout_s: the time for which samples may wait without any new token.
        clock: returns seconds, without the time for which this process was stopped.
    """

    def __init__(
        self,
        engine: Engine,
        num_waiting: Callable[[], int],
        is_loading: Callable[[], bool],
        stall_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._num_waiting = num_waiting
        self._is_loading = is_loading
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._num_tokens = 0
        self._moved_s = clock()

    @property
    def patience_s(self) -> float:
        """The time without progress that the coordinator has to grant, so that this watch acts first; 0 if idle."""
        return self._stall_timeout_s + STALL_MARGIN_S if self._num_waiting() else 0.0

    async def run(self) -> NoReturn:
        """Look at the engine, again and again.

        Raises:
            StartAgainError: always; the message says how the engine ended or for how long it has made no token.
        """
        while True:
            self.look()
            await asyncio.sleep(POLL_S)

    def look(self) -> None:
        """Look at the engine once.

        Raises:
            StartAgainError: the engine has died, or makes no tokens.
        """
        if not self._engine.is_alive:
            raise StartAgainError(self._engine.explain_death())
        now_s, num_tokens, num_waiting = self._clock(), self._engine.num_generated_tokens, self._num_waiting()
        if num_tokens != self._num_tokens or not num_waiting or self._is_loading():
            self._num_tokens, self._moved_s = num_tokens, now_s
        elif now_s - self._moved_s >= self._stall_timeout_s:
            raise StartAgainError(
                f"the engine has made no token for {now_s - self._moved_s:.0f} s while {num_waiting} samples wait for "
                "tokens"
            )
