"""One child process as the service sees it: start, call, close."""

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
    """One sample as the function sees it. ``label_json`` is empty where there is none; ``sample_id`` is for logs."""

    sample_id: str
    query: str
    prompt: str
    label_json: str


@dataclass(frozen=True, slots=True)
class CallFault:
    """The function raised or returned nonsense; the child is well. ``key`` is the same for faults of the same kind."""

    reason: str
    key: str
    traceback: str


@dataclass(frozen=True, slots=True)
class CallResult:
    """``scores`` in the order of the jobs. ``notes`` say what was left out of the extra logs, by key."""

    scores: tuple[Score, ...]
    notes: dict[str, str]


class ProcessLostError(RollMeshError):
    """The child died, took too long, or broke the protocol: close it and start another."""


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
        """Start a child and wait until it has loaded the file. Call it in the main thread: the child dies with the
        thread that started it.

        Args:
            path: absolute.
            timeout_s: for importing the file.

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
        """Hand samples to the function.

        Raises:
            ProcessLostError: no proper answer within ``timeout_s``; the process must be closed. `CallTimeoutError` if
                the function still computes.
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
        """End the child, whatever it is doing. Harmless to repeat."""
        self._writer.transport.abort()
        try:
            await asyncio.to_thread(self._child.end)
        finally:
            self._child.end()  # where the thread was not waited for: the signal has been sent, so this is quick
            self._output.close()


def read_reply(reply: Any, count: int) -> CallResult | CallFault:
    """Judge the child's answer for ``count`` samples. User code shares a process with the code that wrote it, so
    nothing is taken for granted.

    Raises:
        ValueError: it is not an answer.
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
