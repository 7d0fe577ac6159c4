"""The identity of a run in Redis: finding an earlier run of the same name, and clearing its keys.

A run's name is part of its keys, but two runs may have the same name. Therefore the keys carry an identity: a random
id, which a run keeps for its life, and a fingerprint of its configuration. A run never works on keys of another
identity.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from redis import Redis

from rollmesh.errors import ConfigError
from rollmesh.replay.connection import connect_blocking, translate_errors, without_password
from rollmesh.replay.keys import Keys

OWNER_TTL_S = 10.0
"""Seconds after which an owner key ends that its process does not renew."""
_POLL_S = 0.25
_KEYS_PER_CALL = 500
_PLACE = "run.name"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Tells a run from other runs of the same name.

    Attributes:
        id: random; the same from the run's first process to its last.
        fingerprint: digest of the configuration, as hexadecimal digits.
    """

    id: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class KnownRun:
    """The run whose keys are in Redis.

    Attributes:
        name: the run's name.
        prefix: beginning of the run's keys.
        identity: the run's identity; None for keys of an older version of RollMesh, which wrote no identity.
        age_s: seconds since the run's start; None for a run without identity.
        state: "running", "interrupted", "finished" or "failed".
        num_opened: number of groups that the run opened.
        is_owned: whether a process drives the run now, or drove the run until a few seconds ago.
    """

    name: str
    prefix: str
    identity: RunIdentity | None
    age_s: float | None
    state: str
    num_opened: int
    is_owned: bool

    def refusal(self, place: str = _PLACE) -> ConfigError:
        """Return the error that says why no other run of this name may start, and what to do."""
        since = "" if self.age_s is None else f" that started {_duration(self.age_s)} ago"
        keys = f"Redis holds keys {self.prefix}* of a run named {self.name!r}{since}"
        if self.is_owned:
            return ConfigError(place, f"{keys} and still goes on", "end that run, or choose another name")
        groups = f"{self.num_opened} group{'s' * (self.num_opened != 1)} opened"
        fix = "pass --overwrite to `rollmesh up` to clear those keys, or choose another name"
        return ConfigError(place, f"{keys} and is {self.state} ({groups})", fix)


def find_run(client: Redis, name: str) -> KnownRun | None:
    """Return the run whose keys contain ``name``; None if there are no such keys. O(1).

    Raises:
        UnavailableError: Redis is away.
    """
    keys = Keys(name)
    with translate_errors(), client.pipeline(transaction=True) as pipeline:
        pipeline.hgetall(keys.identity)
        pipeline.exists(keys.owner)
        pipeline.hget(keys.meta, "opened")
        pipeline.exists(keys.meta)
        pipeline.time()
        fields, is_owned, num_opened, has_meta, (now_s, _) = pipeline.execute()
    if not fields and not has_meta:
        return None
    known: dict[str, str] = {key.decode(): value.decode() for key, value in fields.items()}
    identity = RunIdentity(known["id"], known.get("fingerprint", "")) if "id" in known else None
    age_s = float(now_s) - float(known["created_s"]) if "created_s" in known else None
    state = known.get("state", "interrupted")
    if state == "running" and not is_owned:
        state = "interrupted"
    return KnownRun(name, keys.prefix, identity, age_s, state, int(num_opened or 0), bool(is_owned))


def refuse_known_run(url: str, timeout_s: float, name: str) -> None:
    """Refuse to start a run if Redis holds keys of an earlier run of this name.

    Raises:
        ConfigError: names the keys, the age and state of the run that wrote them, and the fix.
        UnavailableError: Redis is away.
    """
    client = connect_blocking(url, timeout_s)
    try:
        known = find_run(client, name)
    finally:
        client.close()
    if known is not None:
        raise known.refusal()


def expect_own_run(url: str, timeout_s: float, name: str, run_id: str) -> None:
    """Check that the keys of a run's name belong to this run, and that no process drives the run. For a resumed run.

    From then on, a run that had ended counts as interrupted. So a coordinator that starts can tell a run that is
    resumed from a run that has ended.

    There may be no keys at all, if the run was interrupted before it wrote a key. If a process was killed, its owner
    key still lives for a while; the function waits up to `OWNER_TTL_S` for its end.

    Args:
        url: address of Redis.
        timeout_s: seconds that one command may take.
        name: the run's name.
        run_id: the id in the run's identity.

    Raises:
        ConfigError: the keys belong to another run, or a process still drives the run.
        UnavailableError: Redis is away.
    """
    client: Any = connect_blocking(url, timeout_s)
    try:
        known = find_run(client, name)
        if known is None:
            return
        if known.identity is None or known.identity.id != run_id:
            problem = f"{describe_server(url)} holds keys {known.prefix}* of another run of this name"
            raise ConfigError(
                _PLACE, problem, "name the Redis that this run had, or start the run anew with --overwrite"
            )
        _wait_until_free(client, name)
        with translate_errors():
            client.hset(Keys(name).identity, "state", "interrupted")
    finally:
        client.close()


def clear_run(url: str, timeout_s: float, name: str) -> int:
    """Remove the keys of an earlier run. The keys of a run that a process still drives stay.

    If a process was killed, its owner key still lives for a while; the function waits up to `OWNER_TTL_S` for its end.

    Returns:
        The number of removed keys.

    Raises:
        ConfigError: the run still goes on.
        UnavailableError: Redis is away.
    """
    client: Any = connect_blocking(url, timeout_s)
    try:
        known = _wait_until_free(client, name)
        return 0 if known is None else _unlink_all(client, known.prefix)
    finally:
        client.close()


def _wait_until_free(client: Any, name: str) -> KnownRun | None:
    """Wait for the end of the owner key of a process that was killed. Return the run then; None for no keys.

    Raises:
        ConfigError: a process still drives the run.
    """
    while (known := find_run(client, name)) is not None and known.is_owned:
        if _is_renewed(client, Keys(name).owner):
            raise known.refusal()
    return known


def _is_renewed(client: Any, owner: str) -> bool:
    """Wait until a process renews the owner key, or the key ends. Return whether a process renewed the key."""
    left_ms = OWNER_TTL_S * 1000
    while True:
        with translate_errors():
            now_ms = client.pttl(owner)
        if now_ms < 0:
            return False
        if now_ms > left_ms:
            return True
        left_ms = now_ms
        time.sleep(_POLL_S)


def _unlink_all(client: Any, prefix: str) -> int:
    """Remove all keys of a run. The identity goes last, so that a clearing that was cut short can be repeated."""
    identity = f"{prefix}identity".encode()
    num_keys = 0
    with translate_errors():
        batch: list[bytes] = []
        for key in client.scan_iter(match=f"{prefix}*", count=_KEYS_PER_CALL):
            if key != identity:
                batch.append(key)
            if len(batch) >= _KEYS_PER_CALL:
                num_keys += client.unlink(*batch)
                batch.clear()
        return num_keys + int(client.unlink(*batch, identity))


def describe_server(url: str) -> str:
    """Return what error messages call the server: its address without a password."""
    return f"Redis at {without_password(url)}"


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
