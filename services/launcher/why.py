"""`rollmesh why`: who waits for whom in a run, and what would end the wait; or how and why the run ended.

The answer comes from the coordinator's status, which it gives while the run stands still too. A run that has ended is
explained by its `accounting.json`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError, DeadlineError, UnavailableError
from rollmesh.rpc.channel import parse_address
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import MemberStatus, MeshStatus, Role, RunState
from services.config import load_mesh
from services.launcher.outcome import ACCOUNTING, equation, read_json
from services.launcher.run_folder import RESOLVED, check_is_run

DEADLINE_S = 10.0
"""The longest time that the coordinator has for its answer."""
SILENT_S = 5.0
"""A member that sent no heartbeat for this long is called silent."""


def show(target: str, *, is_json: bool) -> int:
    """Print why a run waits, or how it ended. Return the exit code.

    Args:
        target: a run folder, or the coordinator's address.
        is_json: print a JSON object with the list ``facts`` in place of lines.

    Raises:
        ConfigError: ``target`` is neither a run folder nor an address.
        UnavailableError: the coordinator did not answer in time.
    """
    facts = _facts_of_folder(Path(target)) if Path(target).is_dir() else _facts_at(target)
    print(json.dumps({"facts": facts}, indent=2) if is_json else "\n".join(facts))
    return 0


def _facts_of_folder(folder: Path) -> list[str]:
    check_is_run(folder)
    books = read_json(folder / ACCOUNTING)
    if "state" in books:
        return explain_end(books)
    return _facts_at(load_mesh(folder / RESOLVED).coordinator.address)


def _facts_at(address: str) -> list[str]:
    if not parse_address(address, "RUN").port:
        raise ConfigError("RUN", f"{address} leaves the port open", "name a run folder, or the coordinator's host:port")
    try:
        return explain(asyncio.run(_ask(address)))
    except (UnavailableError, DeadlineError, TimeoutError) as error:
        problem = f"no coordinator answers at {address} within {DEADLINE_S:g} s"
        raise UnavailableError(f"{problem}: it is starting, it is frozen, or it has ended") from error


async def _ask(address: str) -> MeshStatus:
    client = CoordinatorClient(address, "why", "why")
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await client.status()
    finally:
        await client.close()


def explain_end(books: dict[str, Any]) -> list[str]:
    """Return the facts about a run that has ended: its state, the reason, the first cause, and its groups.

    Args:
        books: the content of `accounting.json`.
    """
    reason = f": {books['reason']}" if books.get("reason") else ""
    facts = [f"the run is over: {books['state']}{reason}"]
    if cause := books.get("first_cause"):
        facts.append(f"{cause['process']} failed first; its log is {cause['log']}")
    return [*facts, equation(books)]


def explain(status: MeshStatus) -> list[str]:
    """Return the facts about a run in progress: first what the run waits for, then what keeps each part from moving."""
    if status.run_state.is_over:
        reason = f": {status.failure}" if status.failure else ""
        return [f"the run is over: {status.run_state.value}{reason}"]
    place = f"step {status.step} of {status.num_steps}"
    head = f"{status.waiting_for} ({place})" if status.waiting_for else f"the run moves: {place} is the last that ended"
    return [head, *_silences(status), *_workers(status), *_line(status)]


def _silences(status: MeshStatus) -> Iterator[str]:
    for member in status.members:
        if member.heartbeat_age_s >= SILENT_S:
            yield (
                f"{member.name} has sent no heartbeat for {member.heartbeat_age_s:.0f} s; after "
                "coordinator.member_timeout_s it is dropped, and its groups go to others"
            )


def _workers(status: MeshStatus) -> Iterator[str]:
    """Say of each rollout worker what it generates, or why it gets no leases."""
    workers = [member for member in status.members if member.role is Role.ROLLOUT]
    if not workers and status.run_state is not RunState.STARTING:
        yield "no rollout worker is there: start one, and the next publish brings it a version"
    for worker in workers:
        if worker.num_leases:
            yield f"{worker.name} works on {worker.num_leases} groups"
        elif not worker.is_serving:
            yield f"{worker.name} gets no leases: {_lag(worker, status)}"


def _lag(worker: MemberStatus, status: MeshStatus) -> str:
    if status.committed_version is None:
        return "no version is committed yet; the learner's first publish brings it one"
    serves = "no version" if worker.version is None else f"version {worker.version}"
    return f"it serves {serves} and {status.committed_version} is committed; the next publish brings it the newest"


def _line(status: MeshStatus) -> Iterator[str]:
    """Say where the groups are, and what would move them on."""
    count = status.num_groups
    if pending := count.get("pending", 0):
        yield f"{pending} groups wait to be leased: a worker that serves the committed version takes them"
    if ready := count.get("ready", 0):
        yield f"{ready} groups wait for the learner, which takes them when a batch is complete"
    if batched := count.get("batched", 0):
        yield f"the learner has {batched} groups in work"
    if status.num_slots and status.num_slots_used >= status.num_slots:
        yield (
            f"no group is opened: all {status.num_slots} slots are held; the commit of the next version frees the "
            "slots of its step"
        )
