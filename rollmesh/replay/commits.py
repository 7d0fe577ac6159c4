"""Commits on their way to Redis: commits that wait at the same time travel in one round trip.

::

    submit ──► waiting ──► one pipeline at a time: SET payload for each, then one EVALSHA ──► answers ──► submit returns

The callers of `submit` send; there is no background task. Callers take a lock in the order in which they came. The
caller that has the lock sends all commits that wait at that moment. The other callers find their answers when they get
the lock. Therefore a worker needs one connection, however many of its groups end together, and many commits share the
cost of one round trip and one script.

If the round trip fails, all commits in it fail with that error. If the caller that sends is cancelled, the other
commits go back into the line, and their own callers send them. A commit may thereby be sent twice, which changes
nothing.
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
"""Bytes of all payloads in one round trip. A larger payload travels alone."""
_STAGED_TTL_S = 600
"""Seconds after which Redis deletes a payload that no script has kept."""


@dataclass(eq=False, slots=True)
class _Commit:
    """One commit that waits or was sent.

    Attributes:
        key: key of the payload.
        payload: the packed group.
        arguments: arguments of the script for this group.
        stored: the reply to SET, or an error; None until the reply is there.
        answer: the script's answer, or an error; None until the answer is there.
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
        keys: the run's keys.
    """

    def __init__(self, redis: Redis, script: AsyncScript, keys: Keys) -> None:
        self._redis = redis
        self._script = script
        self._keys = keys
        self._waiting: deque[_Commit] = deque()
        self._turn = asyncio.Lock()

    async def submit(self, key: str, payload: bytes, arguments: tuple[str, ...]) -> bytes:
        """Store ``payload`` under ``key``, run the script with ``arguments``, and return the script's answer.

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
        """Take the first commits out of the line. The caller's own commit comes first: the lock keeps the order."""
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
        except BaseException:  # the sending caller was cancelled, and no commit has an answer
            self._waiting.extendleft(reversed(commits))
            raise
        for commit, was_stored, answer in zip(commits, stored, answers, strict=True):
            commit.stored, commit.answer = was_stored, answer

    async def _round_trip(self, commits: Sequence[_Commit]) -> tuple[list[Any], list[Any]]:
        """Send each payload by a plain SET, then one script for all commits. Payloads through Lua cost twice as much.

        A payload that exists already stays: an earlier try of the same lease stored the payload, and the answer was
        lost.

        Returns:
            For each commit the reply to SET, and the script's answer.
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
