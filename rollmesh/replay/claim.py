"""The right to drive a run: one coordinator at a time, and only on keys of its own run.

::

    take ──► owner key, which ends after 10 s ──renew, every 2 s──► ... ──► release (the state that the run ended in)
                                 │
                                 └── Redis is away too long, has lost the keys, or they are another run's ──► a sentence

If the process is killed, its owner key ends by itself. A process that slept for more than 10 s takes its key again,
unless another process has taken the run meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets

from redis.asyncio import Redis

from rollmesh.aio.awake import AwakeClock
from rollmesh.errors import ConfigError, ReplayError, UnavailableError
from rollmesh.replay.connection import translate_errors
from rollmesh.replay.identity import OWNER_TTL_S, RunIdentity
from rollmesh.replay.keys import Keys
from rollmesh.replay.scripts import source

RENEW_S = 2.0
LOOK_LIMIT_S = 30.0
"""More than the time between two looks, including the wait for an answer of Redis. A longer gap is sleep."""


class RunClaim:
    """One process's claim to one run.

    Args:
        redis: from `connection.connect`; the caller closes it.
        name: the run's name.
        identity: the run's identity.
        server: what error messages call the Redis server, e.g. "Redis at redis://host:6379".
        outage_timeout_s: seconds that Redis may be away before the run is given up.
    """

    def __init__(self, redis: Redis, name: str, identity: RunIdentity, server: str, outage_timeout_s: float) -> None:
        self._redis = redis
        self._name = name
        self._identity = identity
        self._server = server
        self._outage_timeout_s = outage_timeout_s
        self._keys = Keys(name)
        self._script = redis.register_script(source("claim"))
        self._token = secrets.token_hex(8)

    async def take(self) -> None:
        """Claim the run. May be repeated.

        Raises:
            ConfigError: the keys are another run's, or another process drives this run.
            UnavailableError: Redis is away.
        """
        answer = await self._run("take")
        if answer == "mine":
            return
        if answer == "held":
            problem = f"another coordinator of the run {self._name!r} is at work on the keys {self._keys.prefix}*"
            raise ConfigError("run.name", problem, "end it, or choose another name")
        problem = f"{self._server} holds keys {self._keys.prefix}* of another run of this name"
        fix = "start with `rollmesh up --overwrite`, which clears them, or choose another name"
        raise ConfigError("run.name", problem, fix)

    async def until_lost(self) -> str:
        """Renew the claim until the claim is lost.

        Returns:
            A sentence that says why the run cannot go on.
        """
        clock = AwakeClock(LOOK_LIMIT_S)  # while this process sleeps, Redis is not away
        last_answer_s = clock()
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                answer = await self._run("renew")
            except (UnavailableError, ReplayError) as error:
                away_s = clock() - last_answer_s
                if away_s >= self._outage_timeout_s:
                    return (
                        f"{self._server}, which holds the replay queue, has been away for {away_s:.0f} s "
                        f"(replay.outage_timeout_s is {self._outage_timeout_s:g}): {error}"
                    )
                continue
            last_answer_s = clock()
            if answer == "gone":
                return f"{self._server} has lost the run's keys {self._keys.prefix}*: it started again without its data"
            if answer != "mine":
                return f"another run named {self._name!r} has taken over the keys {self._keys.prefix}*"

    async def release(self, state: str) -> None:
        """Write how the run ended into Redis, and give the claim back.

        Args:
            state: "finished", "failed" or "interrupted".

        Raises:
            UnavailableError: Redis is away; the claim ends by itself.
        """
        if await self._run("renew") != "mine":
            return
        with translate_errors():
            await self._redis.hset(self._keys.identity, "state", state)
            await self._redis.delete(self._keys.owner)

    async def _run(self, mode: str) -> str:
        arguments = (mode, self._identity.id, self._identity.fingerprint, self._token, round(OWNER_TTL_S * 1000))
        with translate_errors():
            answer = await self._script(keys=self._keys.for_scripts, args=(self._keys.row_prefix, *arguments))
        return str(answer.decode())
