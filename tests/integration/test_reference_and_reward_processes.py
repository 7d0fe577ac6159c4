"""Reward server and reference as processes that the command line starts, with a fake coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rollmesh.errors import RollMeshError
from rollmesh.rpc.hosting import serve_until_over
from rollmesh.rpc.scorer_clients import ReferenceClient, RewardClient
from rollmesh.rpc.server import Server
from rollmesh.types import (
    Heartbeat,
    PolicyVersion,
    PromptId,
    Role,
    RunState,
    Sample,
    Score,
    StopReason,
    Turn,
    VersionSpan,
)
from rollmesh.wire.outcome import ScoreCall
from tests.fakes.coordinator import FakeCoordinator

ROOT = Path(__file__).parents[2]


class Mesh:
    """A coordinator in this process, and services that are started from one mesh file."""

    def __init__(self, coordinator: FakeCoordinator, address: str, folder: Path) -> None:
        self.coordinator = coordinator
        self.address = address
        self._folder = folder
        self._tree: dict[str, Any] = {
            "run": {"name": "r", "directory": str(folder)},
            "model": {"path": str(folder / "model"), "max_length": 64},
            "data": {"path": str(folder / "data.jsonl")},
            "training": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
            "sampling": {"max_new_tokens": 32},
            "algorithm": {"kl": {"coef": 0.1}},
            "coordinator": {"address": address},
            "reward": {"function": str(folder / "graders.py")},
            "reference": {"dtype": "float32", "device": "cpu", "tokens_per_batch": 256},
        }

    @contextlib.asynccontextmanager
    async def service(self, service: str, **settings: Any) -> AsyncIterator[asyncio.subprocess.Process]:
        tree = self._tree | {service: self._tree[service] | settings}
        path = self._folder / "mesh.yaml"
        path.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "rollmesh.cli", service, "--config", str(path), "--name", service]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def address_of(self, process: asyncio.subprocess.Process) -> str:
        """Wait until the service has registered, and return its address. Fail at once if the service has ended."""
        while not self.coordinator.registered:
            if process.returncode is not None:
                raise AssertionError((await end_of(process))[1])
            await asyncio.sleep(0.02)
        return self.coordinator.registered[-1].address


def with_mesh(folder: Path, body: Callable[[Mesh], Awaitable[None]]) -> None:
    async def run() -> None:
        coordinator = FakeCoordinator(heartbeat_interval_s=0.05, member_timeout_s=20.0)
        async with asyncio.timeout(240), coordinator.serve() as server:
            await body(Mesh(coordinator, server.address, folder))

    asyncio.run(run())


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def end_of(process: asyncio.subprocess.Process) -> tuple[int, str]:
    _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


def a_sample() -> Sample:
    return Sample(
        sample_id="train:0:3/0/0",
        index=0,
        prompt_id=PromptId("train", 0, 3),
        prompt_token_ids=np.array([1, 2], np.int32),
        response_token_ids=np.array([3, 4, 5], np.int32),
        turns=(Turn(3, 0, StopReason.STOP),),
        behaviour_logprobs=np.zeros(3, np.float32),
        version_spans=(VersionSpan(PolicyVersion(0, 0), 0, 3),),
    )


async def score(address: str) -> Score:
    client = RewardClient(address)
    await client.connect(30.0)
    outcome = await client.score(ScoreCall(a_sample(), "p", "query", "", "default"), 30.0)
    await client.close()
    assert isinstance(outcome, Score), outcome
    return outcome


REPORTS_ITS_PID = "import os\ndef reward_func(queries, prompts, labels):\n    return os.getpid()"


@pytest.mark.parametrize(("state", "exit_code"), [(RunState.FINISHED, 0), (RunState.FAILED, 1)])
def test_reward_serves_until_the_run_is_over(tmp_path: Path, state: RunState, exit_code: int) -> None:
    (tmp_path / "graders.py").write_text(REPORTS_ITS_PID)

    async def body(mesh: Mesh) -> None:
        async with mesh.service("reward") as process:
            child = int((await score(await mesh.address_of(process))).reward)
            assert is_alive(child)
            mesh.coordinator.heartbeat = Heartbeat(state, None, "the learner gave up" if exit_code else "")
            code, errors = await end_of(process)
            assert code == exit_code, errors
            assert ("the learner gave up" in errors) == (exit_code == 1)
            assert [call.failure for call in mesh.coordinator.left] == [""]
            assert not is_alive(child)
            assert all(json.loads(line)["run"] == "r" for line in errors.splitlines())

    with_mesh(tmp_path, body)


def test_reward_leaves_in_good_order_on_a_signal(tmp_path: Path) -> None:
    (tmp_path / "graders.py").write_text(REPORTS_ITS_PID)

    async def body(mesh: Mesh) -> None:
        async with mesh.service("reward", num_processes=2) as process:
            await mesh.address_of(process)
            process.send_signal(signal.SIGTERM)
            code, errors = await end_of(process)
            assert code == 0, errors
            assert [call.failure for call in mesh.coordinator.left] == [""]

    with_mesh(tmp_path, body)


def test_a_reward_file_at_fault_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "graders.py").write_text("def score(): pass")

    async def body(mesh: Mesh) -> None:
        async with mesh.service("reward") as process:
            code, errors = await end_of(process)
        assert code == 2
        assert f"error: reward.function: {tmp_path}/graders.py has no reward_func (it defines score)" in errors
        assert "Traceback" not in errors
        assert not mesh.coordinator.registered

    with_mesh(tmp_path, body)


def test_a_reward_port_in_use_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "graders.py").write_text(REPORTS_ITS_PID)

    async def body(mesh: Mesh) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with mesh.service("reward", address=f"127.0.0.1:{listener.getsockname()[1]}") as process:
                code, errors = await end_of(process)
        assert code == 2
        assert "error: reward.address" in errors

    with_mesh(tmp_path, body)


def test_work_that_fails_ends_the_service_and_is_reported_to_the_coordinator(tmp_path: Path) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.1)
        raise RollMeshError("the pool burst")

    async def body(mesh: Mesh) -> None:
        with pytest.raises(RollMeshError, match="the pool burst"):
            await serve_until_over(
                Server("127.0.0.1:0", {}),
                fail,
                coordinator_address=mesh.address,
                run_id="r",
                role=Role.REWARD,
                name="reward",
                stop=asyncio.Event(),
            )
        assert [call.failure for call in mesh.coordinator.left] == ["the pool burst"]

    with_mesh(tmp_path, body)


def save_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_reference_serves_until_the_run_is_over(tmp_path: Path) -> None:
    save_model(tmp_path / "model")

    async def body(mesh: Mesh) -> None:
        async with mesh.service("reference") as process:
            client = ReferenceClient(await mesh.address_of(process))
            logprobs = await client.compute_logprobs(a_sample(), 1.0, 60.0)
            assert isinstance(logprobs, np.ndarray)
            assert logprobs.shape == (3,)
            await client.close()
            mesh.coordinator.heartbeat = Heartbeat(RunState.FINISHED, None)
            code, errors = await end_of(process)
            assert code == 0, errors
            assert all(json.loads(line)["run"] == "r" for line in errors.splitlines())

    with_mesh(tmp_path, body)


def test_a_reference_without_a_model_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    async def body(mesh: Mesh) -> None:
        async with mesh.service("reference") as process:
            code, errors = await end_of(process)
        assert code == 2
        assert f"error: model.path: {tmp_path}/model does not exist" in errors
        assert "Traceback" not in errors

    with_mesh(tmp_path, body)
