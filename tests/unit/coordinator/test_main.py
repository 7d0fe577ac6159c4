"""The coordinator as a process: what it refuses to start with, and what its exit code says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rollmesh.errors import ConfigError
from rollmesh.replay.connection import connect
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.ledger import Ledger
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.server import Server
from rollmesh.types import Announcement, PolicyVersion, Role, RunState
from rollmesh.v1.rollout_pb2_grpc import add_RolloutServiceServicer_to_server
from services.config import MeshConfig, dump_mesh
from services.coordinator.main import main
from tests.fakes.rollout import FakeRollout
from tests.unit.coordinator.harness import DIGEST, PLAN, mesh_config


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"coordinator": {"address": "127.0.0.1:0"}}, r"coordinator\.address: '127\.0\.0\.1:0' leaves the port open"),
        ({"coordinator": {"address": "nowhere"}}, r"coordinator\.address: 'nowhere'"),
        ({"replay": {"url": None}}, r"replay\.url: is not set; start the mesh with `rollmesh up`"),
        ({"replay": {"url": "redis://127.0.0.1:1"}}, r"replay\.url: redis://127\.0\.0\.1:1 cannot be used"),
        ({"data": {"path": "absent.jsonl"}}, r"data\.path: absent\.jsonl does not exist"),
        ({"evaluation": {"data": {"path": "absent.jsonl"}}}, r"evaluation\.data\.path: absent\.jsonl does not exist"),
    ],
)
def test_a_fault_of_the_configuration_is_found_before_anything_starts(
    tmp_path: Path, redis_url: str, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        main(mesh_config(tmp_path, redis_url, **sections), "coordinator")


def test_a_port_in_use_is_named(tmp_path: Path, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"coordinator\.address: .* is in use"):
            main(mesh_config(tmp_path, redis_url, coordinator={"address": address}), "coordinator")


@contextmanager
def coordinator_process(config: MeshConfig, folder: Path) -> Iterator[subprocess.Popen[str]]:
    path = folder / "mesh.yaml"
    path.write_text(dump_mesh(config))
    command = [sys.executable, "-m", "rollmesh.cli", "coordinator", "--config", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def config(tmp_path: Path, redis_url: str) -> MeshConfig:
    """One step of one group, at a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    training = {"steps": 1, "prompts_per_step": 1}
    return mesh_config(tmp_path, redis_url, coordinator={"address": address}, training=training)


async def act_as_a_mesh(config: MeshConfig, failure: str) -> None:
    """A learner and a worker go through a run; with ``failure`` the worker fails after its first version."""
    assert config.replay.url is not None
    address, run_id = config.coordinator.address, config.run.name
    service = {"rollmesh.v1.RolloutService": (add_RolloutServiceServicer_to_server, FakeRollout())}
    redis = connect(config.replay.url, 5.0)
    async with (
        Server("127.0.0.1:0", service, grace_s=0.1) as server,
        CoordinatorClient(address, "learner") as learner,
        CoordinatorClient(address, "rollout-0") as worker,
    ):
        await learner.register(run_id, Role.LEARNER, "127.0.0.1:1")
        await worker.register(run_id, Role.ROLLOUT, server.address, 1)
        await learner.begin_publish(Announcement(PolicyVersion(0, 0), 0, PLAN, "127.0.0.1", 1, 20.0), timeout_s=30)
        await learner.finish_publish(PolicyVersion(0, 0), DIGEST, timeout_s=30)
        if failure:
            await worker.leave(failure)
        else:
            async with worker.lease_stream() as stream:
                stream.grant(1)
                lease = await asyncio.wait_for(anext(stream), 30)
            await Ledger(redis, run_id).give_back(lease.group_id, lease.fencing_token, "no good", is_final=True)
            await learner.report_step(1, PolicyVersion(0, 1), {}, True)
            await worker.leave()
        heartbeat = await learner.heartbeat()
        assert heartbeat.run_state is (RunState.FAILED if failure else RunState.FINISHED)
        await learner.leave()
    await redis.aclose()


def test_a_finished_run_ends_with_0_and_leaves_its_accounting(config: MeshConfig, tmp_path: Path) -> None:
    with coordinator_process(config, tmp_path) as process:
        asyncio.run(asyncio.wait_for(act_as_a_mesh(config, ""), 100))
        assert process.wait(timeout=60) == 0
    books = json.loads((config.run.folder / "accounting.json").read_text())
    assert (books["num_groups"]["failed"], books["reasons"]) == (1, {"no good": 1})
    assert books["shortfall"] == ""
    assert (books["state"], books["reason"]) == ("completed", "")


def test_a_failed_run_ends_with_1_and_says_why(config: MeshConfig, tmp_path: Path) -> None:
    with coordinator_process(config, tmp_path) as process:
        asyncio.run(asyncio.wait_for(act_as_a_mesh(config, "the engine died"), 100))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "error: the run failed: rollout-0: the engine died"


def test_a_signal_stops_the_process_in_order(config: MeshConfig, tmp_path: Path) -> None:
    async def join() -> None:
        async with CoordinatorClient(config.coordinator.address, "learner") as learner:
            await learner.register(config.run.name, Role.LEARNER, "127.0.0.1:1", timeout_s=100)

    with coordinator_process(config, tmp_path) as process:
        asyncio.run(join())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_a_redis_that_goes_away_fails_the_run_with_one_sentence(tmp_path: Path) -> None:
    async def until_it_serves(config: MeshConfig) -> None:
        async with CoordinatorClient(config.coordinator.address, "looker") as looker:
            await looker.status(timeout_s=100)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = {"address": f"127.0.0.1:{probe.getsockname()[1]}"}
    with EmbeddedRedis.start(tmp_path / "redis") as server:
        replay = {"outage_timeout_s": 0.5}
        config = mesh_config(tmp_path, server.url, coordinator=address, replay=replay)
        with coordinator_process(config, tmp_path) as process:
            asyncio.run(until_it_serves(config))
            os.kill(server.pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(
        f"error: the run failed: Redis at {server.url}, which holds the replay queue, has been away for "
    )
