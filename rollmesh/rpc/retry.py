"""Repeats unary calls within bounds: one deadline for all tries, and growing pauses that the server may lengthen."""

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
"""A try with less time may miss its deadline whatever the peer does. Its error then says less than the error before."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses between tries, in seconds.

    The pauses grow by ``factor`` from ``initial_s`` to ``maximum_s``. Each pause is shortened at random by up to half,
    so that the clients of a failed server do not all return at the same time. The defaults give pauses of up to 0.1,
    0.2, 0.4, 0.8, 1.6, 2.0, 2.0 ... s.
    """

    initial_s: float = 0.1
    maximum_s: float = 2.0
    factor: float = 2.0

    def pauses(self) -> Iterator[float]:
        """Yield pauses without end."""
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
    """Call ``attempt`` until a try answers, a try fails for good, or the time is up.

    An `UnavailableError` leads to another try, and so does a `DeadlineError` where time is left. So ``attempt`` must be
    safe to repeat.

    Args:
        attempt: makes one try. ``attempt`` gets the seconds that the try may take, and must not take longer.
        timeout_s: time for all tries and pauses together.
        attempt_timeout_s: time for one try; None gives each try all the time that is left.
        backoff: the pauses between tries. The server's ``retry_after_s`` lengthens a pause.
        should_retry: says of an `UnavailableError` or a `DeadlineError` whether another try makes sense.

    Raises:
        UnavailableError, DeadlineError: the error of the last try, when no time is left or ``should_retry`` says no. If
            ``timeout_s`` cut the last try short, the error of the try before.
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
    """Call a method of a generated stub, with the retries of `retry` and with errors of the mesh for statuses.

    Args:
        method: the method, e.g. ``stub.Register``; safe to repeat.
        request: the method's message.
        timeout_s: time for all tries together.
        attempt_timeout_s: time for one try.
        peer: the name of the peer, for errors.
        backoff: the pauses between tries.

    Returns:
        The method's answer.
    """

    async def attempt(left_s: float) -> Any:
        with translate_errors(peer):
            return await method(request, timeout=left_s)

    return await retry(attempt, timeout_s=timeout_s, attempt_timeout_s=attempt_timeout_s, backoff=backoff)
