"""Commits on their way to Redis: those that wait at the same time travel in one round trip.

::

    submit ──► waiting ──► one pipeline at a time: SET payload for each, then one EVALSHA ──► answers ──► submit returns

There is no task of its own: of those who wait, the first whose turn it is sends for all, and the others find their
answer when their turn comes. So a worker needs one connection however many of its groups end together, and the cost
of round trip and script is shared just when there are many.

An error of the round trip is the error of all who took part. If the one who sends is cancelled, the others go back
into the line and send for themselves; a commit may thereby be sent twice, which it bears.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from rollmesh.errors import ReplayError, UnavailableError
from rollmesh.replay.connection import translate_errors, translated
from rollmesh.replay.keys import Keys

_COMMITS_PER_CALL = 32
_BYTES_PER_CALL = 16 * 1024 * 1024
"""Of payloads in one round trip, unless a single one is larger."""
_STAGED_TTL_S = 600
"""How long a payload lives that no commit claims."""


@dataclass(eq=False, slots=True)
class _Commit:
    """One commit; ``answer`` is the script's or an error, ``stored`` is what SET said; None before.

    ``arguments`` are what the script gets for this group.
    """

    key: str
    payload: bytes
    arguments: tuple[str, ...]
    stored: Any = None
    answer: Any = None


class CommitLine:
    """The commits of one ledger, for one event loop.

    Args:
        redis: from `connection.connect`.
        script: ``scripts/commit.lua``.
        keys: of the run.
    """

    def __init__(self, redis: Redis, script: AsyncScript, keys: Keys) -> None:
        self._redis = redis
        self._script = script
        self._keys = keys
        self._waiting: deque[_Commit] = deque()
        self._turn = asyncio.Lock()

    async def submit(self, key: str, payload: bytes, arguments: tuple[str, ...]) -> bytes:
        """Store ``payload`` under ``key``, run the script with ``arguments`` among others', and give its answer.

        Raises:
            UnavailableError: Redis is away or full, or the payload was gone when the script ran.
            ReplayError: Redis refused.
        """
        commit = _Commit(key, payload, arguments)
        self._waiting.append(commit)
        try:
            async with self._turn:
                if commit.answer is None:
                    await self._send(self._next())
        finally:
            if commit in self._waiting:
                self._waiting.remove(commit)
        return _answer(commit)

    def _next(self) -> list[_Commit]:
        """The first ones that wait. Whose turn it is comes first: turns are given in the order of the line."""
        commits, num_bytes = [self._waiting.popleft()], 0
        while self._waiting and len(commits) < _COMMITS_PER_CALL:
            num_bytes += len(commits[-1].payload)
            if num_bytes + len(self._waiting[0].payload) > _BYTES_PER_CALL:
                break
            commits.append(self._waiting.popleft())
        return commits

    async def _send(self, commits: Sequence[_Commit]) -> None:
        stored: Sequence[Any]
        answers: Sequence[Any]
        try:
            with translate_errors():
                stored, answers = await self._round_trip(commits)
        except (UnavailableError, ReplayError) as error:
            stored = answers = [error] * len(commits)
        except BaseException:  # cancelled: the others have no answer
            self._waiting.extendleft(reversed(commits))
            raise
        for commit, was_stored, answer in zip(commits, stored, answers, strict=True):
            commit.stored, commit.answer = was_stored, answer

    async def _round_trip(self, commits: Sequence[_Commit]) -> tuple[list[Any], list[Any]]:
        """Each payload by a plain SET (through Lua it would cost twice as much), then the script for all of them.

        A payload that is there already stays: it is this lease's own, of a try whose answer was lost.

        Returns:
            For each commit what SET said, and what the script did.
        """
        keys = self._keys.for_scripts
        arguments = [self._keys.row_prefix, *(argument for commit in commits for argument in commit.arguments)]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for commit in commits:
                pipeline.set(commit.key, commit.payload, nx=True, ex=_STAGED_TTL_S)
            pipeline.evalsha(self._script.sha, len(keys), *keys, *arguments)
            *stored, answers = await pipeline.execute(raise_on_error=False)
        if isinstance(answers, exceptions.NoScriptError):
            answers = await self._script(keys=keys, args=arguments)
        if isinstance(answers, exceptions.RedisError):
            raise answers
        return stored, answers


def _answer(commit: _Commit) -> bytes:
    answer, stored = commit.answer, commit.stored
    if isinstance(answer, (UnavailableError, ReplayError)):
        raise type(answer)(str(answer)) from answer
    if isinstance(answer, exceptions.RedisError):
        raise translated(answer) from answer
    if answer == b"missing":
        if isinstance(stored, exceptions.RedisError):
            raise translated(stored) from stored
        raise UnavailableError(f"the payload {commit.key} is gone before it was committed")
    result: bytes = answer
    return result
