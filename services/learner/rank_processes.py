"""Starts the ranks of a learner as processes, and ends all of them when one of them ends too early.

::

    rollmesh learner ──► rollmesh learner, RANK=0
       this process  ──► rollmesh learner, RANK=1 ...

====================================================  ================  ===================================
the first that happens                                other ranks       exit code of this process
====================================================  ================  ===================================
all ranks end with 0                                                    0
a signal that nobody here sent kills a rank           killed at once    `EXIT_START_AGAIN`
a rank ends by an error of its own                    killed at once    that rank's
a rank ends because it lost another rank              killed, once the  the lost rank's, if it ended by an
                                                      lost rank ended   error of its own; `EXIT_START_AGAIN`
a stop signal reaches this process                    get SIGTERM       that of rank 0
====================================================  ================  ===================================

The ranks never outlive this process: when this process is killed, the kernel kills the ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollmesh.aio.service import run_service
from rollmesh.aio.tether import tethered
from rollmesh.errors import EXIT_START_AGAIN, StartAgainError

RANKS_HOST = "127.0.0.1"
"""The address at which the ranks on this machine find each other."""
LOST_RANK_S = 5.0
"""Time for a rank that another rank has lost to end, and to say why."""
STOP_S = 12.0
"""Time for all ranks to end after a stop signal."""


def run_ranks(command: Sequence[str], num_ranks: int, name: str) -> int:
    """Run ``command`` once for each rank, until all ranks have ended. Return the exit code.

    Args:
        command: the program of each rank. Its environment has the variables of `rank_environment`.
        num_ranks: the number of ranks.
        name: the name of the learner, for logs.

    Raises:
        StartAgainError: a signal killed a rank, or the ranks lost each other. All ranks have ended.
    """
    with socket.socket() as held:
        # A bound socket that does not listen keeps the port free until rank 0 listens there.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((RANKS_HOST, 0))
        port = held.getsockname()[1]
        environments = [rank_environment(os.environ, rank, num_ranks, port) for rank in range(num_ranks)]
        return run_service(lambda stop: _run(command, environments, stop), name, stop_timeout_s=2 * STOP_S)


def rank_environment(environment: Mapping[str, str], rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment of one rank: the environment of this process, and the rank's place.

    The rank is tied to this process, and not to the launcher of this process. Without OMP_NUM_THREADS each rank would
    use all cores.
    """
    passed = {key: value for key, value in environment.items() if key != "ROLLMESH_LAUNCHER_PID"}
    return {
        "OMP_NUM_THREADS": "1",
        **passed,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": RANKS_HOST,
        "MASTER_PORT": str(port),
    }


@dataclass(frozen=True)
class _Rank:
    """One rank as a child process, and the task that waits for its end."""

    index: int
    process: asyncio.subprocess.Process
    end: asyncio.Task[int]

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the number of the signal; None while the rank runs."""
        return self.process.returncode

    @property
    def has_lost_another(self) -> bool:
        return self.exit_code == EXIT_START_AGAIN

    def describe(self) -> str:
        assert self.exit_code is not None
        how = f"was killed by signal {-self.exit_code}" if self.exit_code < 0 else "lost another rank"
        return f"rank {self.index} {how}"


async def _run(command: Sequence[str], environments: Sequence[Mapping[str, str]], stop: asyncio.Event) -> int:
    ranks: list[_Rank] = []
    try:
        for index, environment in enumerate(environments):
            process = await asyncio.create_subprocess_exec(
                *tethered(command, should_kill=True),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which passes it on once
            )
            ranks.append(_Rank(index, process, asyncio.create_task(process.wait(), name=f"end of rank {index}")))
        return await _until_over(ranks, stop)
    finally:
        await _kill(ranks)


async def _until_over(ranks: Sequence[_Rank], stop: asyncio.Event) -> int:
    """Wait until all ranks have ended well, one has ended otherwise, or somebody stops the learner.

    Raises:
        StartAgainError: a signal killed a rank, or the ranks lost each other.
    """
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        while running := {rank.end for rank in ranks if rank.exit_code is None}:
            await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                return await _pass_on_stop(ranks)
            if any(rank.exit_code for rank in ranks):
                return await _judge(ranks)
        return 0
    finally:
        stopping.cancel()


async def _pass_on_stop(ranks: Sequence[_Rank]) -> int:
    """Send SIGTERM to all ranks, and give them `STOP_S` to end.

    Return the exit code of rank 0; 128 + the signal's number if a signal ended rank 0.
    """
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.terminate()
    await asyncio.wait({rank.end for rank in ranks}, timeout=STOP_S)
    await _kill(ranks)
    code = ranks[0].exit_code or 0
    return code if code >= 0 else 128 - code


async def _judge(ranks: Sequence[_Rank]) -> int:
    """End all ranks after one of them ended too early. Return the exit code of the rank that ended by its own error.

    Raises:
        StartAgainError: no rank ended by an error of its own.
    """
    if all(rank.has_lost_another for rank in ranks if rank.exit_code):
        running = {rank.end for rank in ranks if rank.exit_code is None}
        if running:
            await asyncio.wait(running, timeout=LOST_RANK_S)
    ended = [rank for rank in ranks if rank.exit_code]
    await _kill(ranks)
    codes = [code for rank in ended if (code := rank.exit_code or 0) > 0 and not rank.has_lost_another]
    if codes:
        return codes[0]
    killed = [rank for rank in ended if not rank.has_lost_another]
    raise StartAgainError(f"{(killed or ended)[0].describe()}; the other ranks were ended")


async def _kill(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.kill()
    await asyncio.gather(*(rank.end for rank in ranks))
