"""`rollmesh status`: print the state of a running mesh."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import shlex
from pathlib import Path

from rollmesh.errors import ConfigError, DeadlineError, UnavailableError
from rollmesh.replay.accounting import EndState
from rollmesh.rpc.channel import parse_address
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import MeshStatus, PolicyVersion, RunState
from services.config import ScorerConfig, load_mesh
from services.launcher.outcome import ACCOUNTING, read_json
from services.launcher.progress import format_status
from services.launcher.run_folder import REQUESTED


def show(config: ScorerConfig, *, is_json: bool) -> int:
    """Print the coordinator's status. Return the exit code.

    Raises:
        ConfigError: the mesh file leaves the coordinator's port open, and no run folder names the port.
        UnavailableError: the coordinator does not answer.
    """
    address = find_coordinator(config.coordinator.address, config.run.folder)
    try:
        status = asyncio.run(_ask(address))
    except (UnavailableError, DeadlineError) as error:
        raise UnavailableError(
            f"run {config.run.name}: no coordinator answers at {address}; {_end_of(config.run.folder)}"
        ) from error
    print(json.dumps(_plain(status), indent=2) if is_json else _table(status))
    return 0


def _end_of(folder: Path) -> str:
    """Return a clause about the end of the run, from the files of the run folder."""
    books = read_json(folder / ACCOUNTING)
    if "state" not in books:
        if not (folder / REQUESTED).exists():
            return "the run is over, or was never started"
        return f"the run is starting, or it was cut off: then {_continue(folder)}"
    reason = f" ({books['reason']})" if books.get("reason") else ""
    hint = "" if books["state"] == EndState.COMPLETED.value else f"; {_continue(folder)}"
    return f"the run is over: {books['state']}{reason}{hint}"


def _continue(folder: Path) -> str:
    return f"continue with: rollmesh resume {shlex.quote(str(folder))}"


def find_coordinator(address: str, folder: Path) -> str:
    """Return the coordinator's address with its port.

    Args:
        address: the address in the mesh file. With port 0 the run folder gives the address.
        folder: the run folder, in which `rollmesh up` left the resolved configuration.

    Raises:
        ConfigError: neither the mesh file nor the run folder names a port.
    """
    place = "coordinator.address"
    if parse_address(address, place).port:
        return address
    resolved = folder / "mesh.yaml"
    if not resolved.exists():
        problem = f"{address} leaves the port open, and there is no run in {folder}"
        raise ConfigError(place, problem, "start it with `rollmesh up`, or name the coordinator's port")
    address = load_mesh(resolved).coordinator.address
    if not parse_address(address, place).port:
        raise ConfigError(place, f"{address} in {resolved} leaves the port open", "wait until the run has started")
    return address


async def _ask(address: str) -> MeshStatus:
    client = CoordinatorClient(address, "status", "status")
    try:
        return await client.status()
    finally:
        await client.close()


def _plain(value: object) -> object:
    """Return dataclasses and enums as values that JSON can hold."""
    if isinstance(value, PolicyVersion):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _table(status: MeshStatus) -> str:
    state = "" if status.run_state is RunState.STARTING else f"{status.run_state.value} · "
    lines = [f"run {status.run_id} · {state}{format_status(status)}"]
    if status.failure:
        lines.append(f"failure: {status.failure}")
    counts = ", ".join(f"{count} {state}" for state, count in status.num_groups.items() if count)
    lines += [f"groups: {counts or 'none'}", f"{'member':<14}{'role':<11}{'version':<9}{'leases':<8}address"]
    for member in status.members:
        version = str(member.version) if member.version else "-"
        lines.append(f"{member.name:<14}{member.role.value:<11}{version:<9}{member.num_leases:<8}{member.address}")
    return "\n".join(lines)
