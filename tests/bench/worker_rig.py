"""A rollout worker at work in this process, with everything real around it but the coordinator.

::

    leases ──► FakeCoordinator (gRPC) ──► Worker ──► Engine (vLLM)
                                            ├──► reward service, a process of its own
                                            └──► Ledger on a Redis of its own

The same engine is asked directly in between, so that vLLM starts once and both sides find the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.data.render import load_tokenizer
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.rows import GroupRow
from rollmesh.types import GroupState, Lease, LeaseKind, PolicyVersion, PromptId, SamplingSpec
from services.config import MeshConfig, dump_mesh, load_mesh
from services.rollout.compose import engine_settings, make_renderers, make_worker
from services.rollout.engine import Engine
from tests.bench.peer import REPOSITORY
from tests.fakes.coordinator import FakeCoordinator
from tests.integration.publisher import Publisher

DEMO = REPOSITORY / "examples" / "operators"
RUN = "bench"
_MEASURE_TIMEOUT_S = 120.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Throughput:
    """What one measurement gave."""

    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


class WorkerRig:
    """A worker that waits for leases, and its engine."""

    def __init__(
        self, config: MeshConfig, coordinator: FakeCoordinator, engine: Engine, ledger: CoordinatorLedger
    ) -> None:
        self.engine = engine
        self._config = config
        self._coordinator = coordinator
        self._ledger = ledger
        rows = [json.loads(line) for line in config.data.path.read_text().splitlines()]
        self._prompts = [(json.dumps(row["input"]), json.dumps(row["label"])) for row in rows]
        tokenizer = load_tokenizer(config.model.path, False)
        sections = config.model, config.sampling, config.data, config.evaluation
        renderer = make_renderers(tokenizer, *sections)[LeaseKind.TRAIN]
        self._token_ids = [renderer.render(prompt, "bench").token_ids for prompt, _ in self._prompts]
        self._round = 0

    async def through_mesh(self, samplings: Sequence[SamplingSpec]) -> Throughput:
        """One group for each of ``samplings``, from the first lease to the last commit."""
        self._round += 1
        prompt_ids = [PromptId("train", self._round, index) for index in range(len(samplings))]
        await self._ledger.open_groups(prompt_ids)
        rows = await self._ledger.lease("rollout-0", 300.0, len(prompt_ids))
        assert len(rows) == len(prompt_ids), f"{len(rows)} of {len(prompt_ids)} groups were leased"
        num_ready = (await self._ledger.snapshot()).num_groups.get(GroupState.READY, 0)
        started = time.perf_counter()
        for row, sampling in zip(rows, samplings, strict=True):
            self._coordinator.leases.put_nowait(self._lease(row, sampling))
        async with asyncio.timeout(_MEASURE_TIMEOUT_S):
            await self._until_ready(num_ready + len(rows))
        seconds = time.perf_counter() - started
        num_tokens = 0
        for prompt_id in prompt_ids:
            stored = await self._ledger.row(str(prompt_id))
            assert stored is not None
            num_tokens += stored.num_tokens - stored.num_samples * len(self._token_ids[prompt_id.index])
        return Throughput(num_tokens, seconds)

    async def engine_alone(self, samplings: Sequence[SamplingSpec]) -> Throughput:
        """The same prompts and samples with as many groups open at a time; nothing is done with the answers."""
        room = asyncio.Semaphore(self._config.rollout.open_groups(self._config.training.samples_per_prompt))

        async def generate(index: int, sampling: SamplingSpec) -> int:
            async with room:
                calls = [
                    self.engine.generate(f"{index}/{sample}", self._token_ids[index], sampling)
                    for sample in range(self._config.training.samples_per_prompt)
                ]
                return sum(len(completion.token_ids) for completion in await asyncio.gather(*calls))

        started = time.perf_counter()
        async with asyncio.timeout(_MEASURE_TIMEOUT_S):
            counts = await asyncio.gather(*(generate(index, s) for index, s in enumerate(samplings)))
        return Throughput(sum(counts), time.perf_counter() - started)

    async def _until_ready(self, num_groups: int) -> None:
        while True:
            if (await self._ledger.snapshot()).num_groups.get(GroupState.READY, 0) >= num_groups:
                return
            await asyncio.sleep(_POLL_S)

    def _lease(self, row: GroupRow, sampling: SamplingSpec) -> Lease:
        prompt, label = self._prompts[row.prompt_id.index]
        return Lease(
            group_id=row.group_id,
            fencing_token=row.fencing_token,
            kind=LeaseKind.TRAIN,
            prompt_id=row.prompt_id,
            sequence=row.sequence,
            attempt=row.attempt,
            num_samples=self._config.training.samples_per_prompt,
            prompt_json=prompt,
            label_json=label,
            datasource="operators",
            sampling=sampling,
            ttl_s=300.0,
        )


@asynccontextmanager
async def running_worker(folder: Path, overrides: Sequence[str]) -> AsyncIterator[WorkerRig]:
    """The demo's worker without reference service; ``overrides`` are of its mesh file."""
    async with contextlib.AsyncExitStack() as stack:
        redis_server = stack.enter_context(EmbeddedRedis.start(folder / "redis"))
        coordinator = FakeCoordinator(heartbeat_interval_s=1.0, member_timeout_s=60.0)
        server = await stack.enter_async_context(coordinator.serve())
        settings = [
            f"run.name={RUN}",
            f"run.directory={folder}",
            "evaluation=null",
            f"replay.url={redis_server.url}",
            f"coordinator.address={server.address}",
        ]
        config = load_mesh(DEMO / "mesh-no-kl.yaml", [*settings, *overrides])
        config = await _with_reward(stack, config, coordinator, folder / "mesh.yaml")
        redis = connect(redis_server.url, config.replay.timeout_s)
        stack.push_async_callback(redis.aclose)
        engine = await Engine.start(engine_settings(config))
        stack.push_async_callback(engine.stop)
        weights = _weights(config.model.path)
        publisher = Publisher(engine, weights)
        stack.callback(publisher.leave)
        await publisher.publish(PolicyVersion(0, 0), weights)
        stop = asyncio.Event()
        worker = make_worker(config, "rollout-0", load_tokenizer(config.model.path, False))
        working = asyncio.create_task(worker.run(engine, stop), name="worker")
        try:
            yield WorkerRig(config, coordinator, engine, CoordinatorLedger(redis, RUN, term=0))
        finally:
            stop.set()
            await asyncio.wait({working}, timeout=30.0)
            working.cancel()
        working.result()


async def _with_reward(
    stack: contextlib.AsyncExitStack, config: MeshConfig, coordinator: FakeCoordinator, path: Path
) -> MeshConfig:
    """Start the reward service; its address is what it registers with."""
    path.write_text(dump_mesh(config), encoding="utf-8")
    command = [sys.executable, "-m", "rollmesh.cli", "reward", "--config", str(path), "--name", "reward"]
    log = stack.enter_context(path.with_name("reward.log").open("wb"))
    process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stdout=log, stderr=log)
    stack.push_async_callback(_end, process)
    async with asyncio.timeout(config.reward.start_timeout_s):
        while not coordinator.registered:
            if process.returncode is not None:
                raise RuntimeError(f"the reward service ended with {process.returncode}:\n{Path(log.name).read_text()}")
            await asyncio.sleep(0.05)
    section = config.reward.model_copy(update={"address": coordinator.registered[-1].address})
    return config.model_copy(update={"reward": section})


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), 15.0)
    except TimeoutError:
        process.kill()
        await process.wait()


def _weights(model: Path) -> dict[str, Any]:
    """As the checkpoint stores them: a tied head once."""
    from transformers import AutoModelForCausalLM

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(model).named_parameters()}
