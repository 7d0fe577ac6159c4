"""Connections to Redis, the check of a server before a run, and the translation of the client's errors into ours.

The socket's timeout is the only deadline of a command. After a broken connection the client repeats a command a few
times, so that the mesh does not notice a restart of the server. The server may thereby execute a command twice; for
every command of this package, twice has the effect of once. A command that timed out is not repeated: the caller
decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from rollmesh.errors import ConfigError, ReplayError, UnavailableError
from rollmesh.replay.memory import RedisMemory

OLDEST_SERVER = (6, 2)
_NUM_RETRIES = 3
_SHORTEST_TRY_S = 0.5
_BACKOFF_BASE_S = 0.05
_BACKOFF_CAP_S = 0.5
_READ_BYTES = 256 * 1024
"""Bytes of one read by the blocking client: about two usual payloads, and small enough for a core's cache."""
_NOT_NOW = ("OOM", "LOADING", "BUSY", "READONLY", "MISCONF", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN")
_PASSING = (exceptions.TimeoutError, exceptions.BusyLoadingError)
"""Errors of a sound server that is busy or has just started."""
_PLACE = "replay.url"


def connect(url: str, timeout_s: float) -> redis.asyncio.Redis:
    """Return a client for the running event loop. The first command makes the connection.

    Raises:
        ConfigError: ``url`` is not a Redis address.
    """
    retry = AsyncRetry(_backoff(), _NUM_RETRIES, supported_errors=(exceptions.ConnectionError,))
    with _refuse_bad_url(url):
        return redis.asyncio.Redis.from_url(url, retry=retry, **_options(timeout_s))


def connect_blocking(url: str, timeout_s: float) -> redis.Redis:
    """Return a client for threads. The first command makes the connection.

    Raises:
        ConfigError: ``url`` is not a Redis address.
    """
    retry = Retry(_backoff(), _NUM_RETRIES, supported_errors=(exceptions.ConnectionError,))
    with _refuse_bad_url(url):
        return redis.Redis.from_url(url, retry=retry, socket_read_size=_READ_BYTES, **_options(timeout_s))


def check_server(url: str, timeout_s: float) -> None:
    """Refuse a server that cannot hold a run. A server that is slow or loads its data has ``timeout_s`` to answer.

    Raises:
        ConfigError: the server cannot be reached, is a replica, may evict keys, is nearly full, or is older than
            `OLDEST_SERVER`.
    """
    shown = without_password(url)
    try:
        info = _ask_for_info(url, timeout_s)
    except _PASSING as error:
        problem = "has not answered" if isinstance(error, exceptions.TimeoutError) else "was still loading its data"
        fix = "see what holds the server up, correct the address, or raise replay.timeout_s"
        raise ConfigError(_PLACE, f"{shown} {problem} after {timeout_s:g} s", fix) from error
    except exceptions.RedisError as error:
        fix = "start a Redis there, or correct the address and its rights"
        raise ConfigError(_PLACE, f"{shown} cannot be used ({error})", fix) from error
    _check_info(shown, info)


def _ask_for_info(url: str, timeout_s: float) -> dict[str, Any]:
    """Return the first answer. Each try takes half of the time left, so that one lost connection costs only a part."""
    deadline = time.monotonic() + timeout_s
    while True:
        client = connect_blocking(url, max((deadline - time.monotonic()) / 2, min(timeout_s, _SHORTEST_TRY_S)))
        try:
            return dict(client.info())
        except _PASSING:
            if time.monotonic() >= deadline:
                raise
        finally:
            client.close()
        time.sleep(_BACKOFF_BASE_S)


def _check_info(shown: str, info: dict[str, Any]) -> None:
    version = str(info.get("redis_version", "0.0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise ConfigError(_PLACE, f"{shown} is Redis {version}", f"use {oldest} or newer")
    if info.get("role") != "master":
        raise ConfigError(_PLACE, f"{shown} is a replica, which accepts no writes", "name its primary")
    policy = info.get("maxmemory_policy", "noeviction")
    if int(info.get("maxmemory", 0)) > 0 and policy != "noeviction":
        raise ConfigError(
            _PLACE,
            f"{shown} drops keys when its memory is full (maxmemory-policy {policy}), and groups with them",
            "set maxmemory-policy to noeviction",
        )
    memory = RedisMemory.of(info)
    if memory.is_short:
        problem = f"{shown} is nearly full: the server uses {memory}, and a run would wait for memory at once"
        raise ConfigError(_PLACE, problem, "remove what is not needed there, or raise its maxmemory")


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn the client's errors into `UnavailableError` (worth another try) or `ReplayError`.

    For commands of the asynchronous client, this context also keeps a cancellation from getting lost. The client sends
    with `asyncio.wait_for`, which before Python 3.12 drops a cancellation that arrives together with the end of the
    write. A deadline is a cancellation too.
    """
    task = _current_task()
    num_cancellations = 0 if task is None else task.cancelling()
    try:
        yield
    except exceptions.RedisError as error:
        _raise_if_cancelled(task, num_cancellations)
        raise translated(error) from error
    _raise_if_cancelled(task, num_cancellations)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without an event loop: the blocking client
        return None


def _raise_if_cancelled(task: asyncio.Task[Any] | None, num_before: int) -> None:
    """Raise CancelledError if the task was cancelled again after ``num_before`` cancellations."""
    if task is not None and task.cancelling() > num_before:
        raise asyncio.CancelledError


def translated(error: exceptions.RedisError) -> UnavailableError | ReplayError:
    """Return our error for an error of the client. On older servers a script's message contains that memory is full."""
    message = str(error)
    if isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError)):
        return UnavailableError(f"Redis does not answer: {message}")
    if isinstance(error, (exceptions.ReadOnlyError, exceptions.OutOfMemoryError)) or any(
        message.startswith(code) or f"-{code} " in message for code in _NOT_NOW
    ):
        return UnavailableError(f"Redis cannot write now: {message}")
    if "OOM command not allowed" in message:
        return UnavailableError(f"Redis cannot write now: {message}")
    return ReplayError(f"Redis refused: {message}")


def _options(timeout_s: float) -> dict[str, Any]:
    """Return the options of both clients. Replies differ between protocols; payloads are binary and are not decoded."""
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "protocol": 2,
        "decode_responses": False,
    }


def _backoff() -> ExponentialBackoff:
    return ExponentialBackoff(cap=_BACKOFF_CAP_S, base=_BACKOFF_BASE_S)


@contextmanager
def _refuse_bad_url(url: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            _PLACE, f"{without_password(url)!r} is not an address ({error})", "write redis://, rediss:// or unix://"
        ) from error


def without_password(url: str) -> str:
    """Return ``url`` without its password, for logs and messages."""
    netloc = urlsplit(url).netloc
    credentials, separator, host = netloc.rpartition("@")
    return url.replace(netloc, f"***@{host}", 1) if separator and credentials else url
