"""Starts, calls and closes one child process for the service."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgpack

from rollmesh.errors import RollMeshError
from rollmesh.types import Score
from services.reward.launch import (
    LENGTH,
    MAX_REPLY_BYTES,
    Launched,
    check_hello,
    decode,
    died_in_import,
    import_timed_out,
    launch,
)
from services.reward.output import OutputLog

_EXIT_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class RewardJob:
    """The texts of one sample for the function. ``label_json`` is empty for no label; ``sample_id`` is for logs."""

    sample_id: str
    query: str
    prompt: str
    label_json: str


@dataclass(frozen=True, slots=True)
class CallFault:
    """The function raised, or returned no reward; the child is well. Faults of the same kind have the same ``key``."""

    reason: str
    key: str
    traceback: str


@dataclass(frozen=True, slots=True)
class CallResult:
    """The scores in the order of the jobs. ``notes`` tell for each key which extra logs the child left out."""

    scores: tuple[Score, ...]
    notes: dict[str, str]


class ProcessLostError(RollMeshError):
    """The child died, took too long, or broke the protocol. The owner closes the child and starts another."""


class CallTimeoutError(ProcessLostError):
    """The function has not returned in time."""


class RewardProcess:
    """A child that has loaded the user's file. One call at a time."""

    def __init__(
        self, child: Launched, output: OutputLog, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._child = child
        self._output = output
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._child.process.pid

    @classmethod
    async def start(cls, path: Path, timeout_s: float) -> Self:
        """Start a child, and wait until the child has loaded the file.

        Call this in the main thread: the child dies with the thread that started it.

        Args:
            path: the absolute path of the user's file.
            timeout_s: time for importing the file.

        Raises:
            ConfigError: the file cannot be imported in time, or has no usable function.
        """
        output = OutputLog(path.name)
        try:
            child = launch(path, output.write_fd)
        except BaseException:
            output.close()
            raise
        output.child_started()
        reader, writer = await asyncio.open_unix_connection(sock=child.connection)
        process = cls(child, output, reader, writer)
        try:
            async with asyncio.timeout(timeout_s):
                check_hello(path, await process._receive())
        except BaseException as error:
            reason = await process._exit_reason() if isinstance(error, EOFError | OSError | ValueError) else ""
            await process.close()
            if isinstance(error, TimeoutError):
                raise import_timed_out(path, timeout_s) from None
            if reason:
                raise died_in_import(path, reason) from None
            raise
        return process

    async def call(self, jobs: Sequence[RewardJob], timeout_s: float) -> CallResult | CallFault:
        """Call the function with samples.

        Raises:
            ProcessLostError: the child gave no proper answer within ``timeout_s``, and must be closed.
                `CallTimeoutError` if the function still computes.
        """
        request = {
            "queries": [job.query for job in jobs],
            "prompts": [job.prompt for job in jobs],
            "labels": [job.label_json for job in jobs],
        }
        body = msgpack.packb(request)
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(LENGTH.pack(len(body)) + body)
                await self._writer.drain()
                return read_reply(await self._receive(), len(jobs))
        except TimeoutError:
            raise CallTimeoutError(f"reward_func took longer than the {timeout_s:g} s of reward.timeout_s") from None
        except (EOFError, OSError):
            raise ProcessLostError(f"the reward process {await self._exit_reason()} during the call") from None
        except ValueError as error:
            raise ProcessLostError(f"the reward process disturbed the protocol ({error})") from None

    async def _receive(self) -> Any:
        head = await self._reader.readexactly(LENGTH.size)
        length = LENGTH.unpack(head)[0]
        if length > MAX_REPLY_BYTES:
            raise ValueError(f"a reply of {length} bytes")
        return decode(await self._reader.readexactly(length))

    async def _exit_reason(self) -> str:
        return await asyncio.to_thread(self._child.exit_reason, _EXIT_GRACE_S)

    async def close(self) -> None:
        """End the child, whatever the child is doing. Safe to repeat."""
        self._writer.transport.abort()
        try:
            await asyncio.to_thread(self._child.end)
        finally:
            # A cancelled wait leaves the thread alone. The thread has sent the signal, so this call is quick.
            self._child.end()
            self._output.close()


def read_reply(reply: Any, count: int) -> CallResult | CallFault:
    """Check the child's answer for ``count`` samples, and return its result.

    The user's code shares a process with the code that wrote the answer, so this function trusts nothing in it.

    Raises:
        ValueError: ``reply`` is not an answer.
    """
    try:
        if "failure" in reply:
            return CallFault(str(reply["failure"]), str(reply["key"]), str(reply["traceback"]))
        columns = zip(reply["rewards"], reply["scores"], reply["logs"], strict=True)
        scores = tuple(_score(reward, score, logs) for reward, score, logs in columns)
        notes = {str(key): str(note) for key, note in reply["notes"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer that is none: {error!r}") from error
    if len(scores) != count:
        raise ValueError(f"{len(scores)} answers to {count} samples")
    return CallResult(scores, notes)


def _score(reward: Any, score: Any, logs: Any) -> Score:
    numbers = (reward, score, *logs.values())
    if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
        raise ValueError("an answer that is not finite")
    return Score(reward, score, logs)
