"""The right to drive a run: one coordinator at a time, and only on keys of its own run.

::

    take ──► a term, and an owner key that ends after 10 s ──renew, every 2 s──► ... ──► release (how the run ended)
                                 │
                                 └── Redis is away too long, has lost the keys, or they are another run's ──► a sentence

Each `take` gives a higher term, which every call of the coordinator names (see `coordinator_ledger`). A process with
the run's id takes the run at once, also while the former process still lives: the former process then gets
SupersededError, and ends without a word to the members. A process without an id of its own takes an interrupted run of
the same configuration once the owner key of the former process has ended.

If the process is killed, its owner key ends by itself. A process that slept for more than 10 s goes on, unless another
process has taken the run meanwhile.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from redis.asyncio import Redis

from rollmesh.aio.awake import AwakeClock
from rollmesh.errors import ConfigError, ReplayError, SupersededError, UnavailableError
from rollmesh.replay.connection import translate_errors
from rollmesh.replay.identity import OWNER_TTL_S, RunIdentity
from rollmesh.replay.keys import Keys
from rollmesh.replay.scripts import source

RENEW_S = 2.0
LOOK_LIMIT_S = 30.0
"""More than the time between two looks, including the wait for an answer of Redis. A longer gap is sleep."""


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run that a coordinator has taken.

    Attributes:
        term: the coordinator's term; higher than the terms of all earlier coordinators of the run.
        former_state: how the run was left: "" for a new run, "running" if its coordinator was killed or still lives,
            "interrupted", "finished" or "failed". A run that ended and is resumed is "interrupted".
    """

    term: int
    former_state: str


class RunClaim:
    """One process's claim to one run.

    Args:
        redis: from `connection.connect`; the caller closes it.
        name: the run's name.
        identity: the run's identity.
        server: what error messages call the Redis server, e.g. "Redis at redis://host:6379".
        outage_timeout_s: seconds that Redis may be away before the run is given up.
        may_adopt: the id was made for this process: `take` adopts an interrupted run of the same fingerprint, and its
            id with it.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        identity: RunIdentity,
        server: str,
        outage_timeout_s: float,
        *,
        may_adopt: bool = False,
    ) -> None:
        self._redis = redis
        self._name = name
        self._id, self._fingerprint = identity.id, identity.fingerprint
        self._server = server
        self._outage_timeout_s = outage_timeout_s
        self._may_adopt = may_adopt
        self._keys = Keys(name)
        self._script = redis.register_script(source("claim"))
        self._term = 0

    async def take(self) -> ClaimedRun:
        """Claim the run. May be repeated; each call gives a new term.

        Raises:
            ConfigError: the keys are another run's, or another process drives this run.
            UnavailableError: Redis is away.
        """
        answer, *rest = await self._run("take", int(self._may_adopt))
        if answer == "mine":
            self._term, self._id = int(rest[0]), rest[1]
            return ClaimedRun(self._term, former_state=rest[2])
        if answer == "held":
            problem = f"another coordinator of the run {self._name!r} is at work on the keys {self._keys.prefix}*"
            fix = f"end it, wait {OWNER_TTL_S:g} s if it was killed, or choose another name"
            raise ConfigError("run.name", problem, fix)
        if answer == "changed":
            problem = (
                f"{self._server} holds keys {self._keys.prefix}* of an interrupted run that had other settings of "
                "model, data, training, sampling or algorithm"
            )
            raise ConfigError(
                "run.id", problem, "set those settings back, set run.id to that run's id, or choose another run.name"
            )
        problem = f"{self._server} holds keys {self._keys.prefix}* of another run of this name"
        fix = "start with `rollmesh up --overwrite`, which clears them, or choose another name"
        raise ConfigError("run.name", problem, fix)

    async def until_lost(self) -> str:
        """Renew the claim until the claim is lost.

        Returns:
            A sentence that says why the run cannot go on.

        Raises:
            SupersededError: another coordinator has taken the run. The run goes on there.
        """
        clock = AwakeClock(LOOK_LIMIT_S)  # while this process sleeps, Redis is not away
        last_answer_s = clock()
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                answer, *rest = await self._run("renew", self._term)
            except (UnavailableError, ReplayError) as error:
                away_s = clock() - last_answer_s
                if away_s >= self._outage_timeout_s:
                    return (
                        f"{self._server}, which holds the replay queue, has been away for {away_s:.0f} s "
                        f"(replay.outage_timeout_s is {self._outage_timeout_s:g}): {error}"
                    )
                continue
            last_answer_s = clock()
            if answer == "superseded":
                raise SupersededError(
                    f"another coordinator of this run has taken over: the current term is {rest[0]}, and this "
                    f"coordinator has term {self._term}"
                )
            if answer == "gone":
                return f"{self._server} has lost the run's keys {self._keys.prefix}*: it started again without its data"
            if answer != "mine":
                return f"another run named {self._name!r} has taken over the keys {self._keys.prefix}*"

    async def note_end(self, state: str) -> None:
        """Write how the run ended into Redis, and keep the claim. A coordinator that was replaced changes nothing.

        Args:
            state: "finished" or "failed".

        Raises:
            UnavailableError: Redis is away.
        """
        await self._run("end", self._term, state)

    async def release(self, state: str) -> None:
        """Write how the run ended into Redis, and give the claim back. A coordinator that was replaced changes nothing.

        Args:
            state: "finished", "failed" or "interrupted".

        Raises:
            UnavailableError: Redis is away; the claim ends by itself.
        """
        await self._run("release", self._term, state)

    async def _run(self, mode: str, *more: str | int) -> list[str]:
        arguments = (mode, self._id, self._fingerprint, round(OWNER_TTL_S * 1000), *more)
        with translate_errors():
            answer = await self._script(keys=self._keys.for_scripts, args=(self._keys.row_prefix, *arguments))
        return [part.decode() for part in answer]
