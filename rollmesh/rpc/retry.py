"""Bounded retries of unary calls: a deadline over all tries, growing pauses, and the server may ask for longer ones."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rollmesh.errors import DeadlineError, UnavailableError
from rollmesh.rpc.status_codes import translate_errors

AnswerT = TypeVar("AnswerT")

_FAIR_TRY_S = 1.0
"""A try with less time may end by its deadline whatever the peer does, and then says less than the one before."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between tries, in seconds: they grow by ``factor`` from ``initial_s`` to ``maximum_s``, and each is
    shortened by up to half at random, so that clients of one failed server do not come back together."""

    initial_s: float = 0.1
    maximum_s: float = 2.0
    factor: float = 2.0

    def pauses(self) -> Iterator[float]:
        """An endless sequence of pauses."""
        pause_s = self.initial_s
        while True:
            yield pause_s * random.uniform(0.5, 1.0)
            pause_s = min(pause_s * self.factor, self.maximum_s)


async def retry(
    attempt: Callable[[float], Awaitable[AnswerT]],
    *,
    timeout_s: float,
    attempt_timeout_s: float | None = None,
    backoff: Backoff = Backoff(),
    should_retry: Callable[[UnavailableError | DeadlineError], bool] = lambda error: True,
) -> AnswerT:
    """Call ``attempt`` until it answers, fails for good, or the time is up.

    `UnavailableError` and, where time is left, `DeadlineError` are tried again, so ``attempt`` must be safe to
    repeat. It gets the seconds it may take and has to keep to them.

    Args:
        attempt: one try.
        timeout_s: for all tries and pauses together.
        attempt_timeout_s: for one try; None allows each all that is left.
        backoff: pauses between tries; the server's ``retry_after_s`` lengthens them.
        should_retry: judges such an error before each further try.

    Raises:
        UnavailableError, DeadlineError: the last try's, when there is no time for another or ``should_retry`` says no;
            if that one was cut short by ``timeout_s``, the error of the one before.
        RollMeshError: any other error of a try, at once.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + timeout_s
    pauses = backoff.pauses()
    failure: UnavailableError | DeadlineError | None = None
    while True:
        left_s = end - clock()
        try:
            return await attempt(left_s if attempt_timeout_s is None else min(left_s, attempt_timeout_s))
        except (UnavailableError, DeadlineError) as error:
            if failure is None or isinstance(error, UnavailableError) or left_s >= _FAIR_TRY_S:
                failure = error
            pause_s = max(next(pauses), getattr(error, "retry_after_s", 0.0))
            is_final = not should_retry(error)
        if is_final or clock() + pause_s >= end:
            raise failure
        await asyncio.sleep(pause_s)


async def call_unary(
    method: Any,
    request: Any,
    *,
    timeout_s: float,
    attempt_timeout_s: float | None = None,
    peer: str = "",
    backoff: Backoff = Backoff(),
) -> Any:
    """`retry` for a method of a generated stub, with its statuses translated.

    Args:
        method: e.g. ``stub.Register``; safe to repeat.
        request: its message.
        timeout_s: for all tries together.
        attempt_timeout_s: for one try.
        peer: who is called, for errors.

    Returns:
        The method's answer.
    """

    async def attempt(left_s: float) -> Any:
        with translate_errors(peer):
            return await method(request, timeout=left_s)

    return await retry(attempt, timeout_s=timeout_s, attempt_timeout_s=attempt_timeout_s, backoff=backoff)
