"""The weight protocol, over real gRPC, against workers that fail in every step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rollmesh.errors import InvalidArgumentError, SupersededError, TaintedError, UnavailableError, WeightTransferError
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.types import PolicyVersion, Role, RunState
from tests.unit.coordinator.harness import Mesh, mesh_config, running_mesh


@pytest.fixture
def with_mesh(tmp_path: Path, redis_url: str) -> Callable[..., None]:
    def run(body: Callable[[Mesh], Awaitable[None]], num_workers: int = 1, **sections: Any) -> None:
        rollout = {"num_workers": num_workers, "start_timeout_s": 20.0, **sections.pop("rollout", {})}

        async def scenario() -> None:
            async with running_mesh(mesh_config(tmp_path, redis_url, rollout=rollout, **sections)) as mesh:
                await body(mesh)

        asyncio.run(asyncio.wait_for(scenario(), 60))

    return run


def test_a_version_serves_after_all_workers_received_and_loaded_it(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        first, second = await mesh.join("rollout-0"), await mesh.join("rollout-1", num_ranks=2)
        assert mesh.coordinator.run.state is RunState.STARTING
        epoch = await mesh.begin(0)
        assert epoch.world_size == 4
        assert (first.servicer.ranks, second.servicer.ranks) == ([1], [2])
        outcome = await mesh.finish(0)
        assert outcome.is_committed
        assert outcome.members == ("rollout-0", "rollout-1")
        assert outcome.max_pause_s == pytest.approx(0.02)
        assert first.servicer.steps() == ["prepare", "receive", "commit"]
        heartbeat = await mesh.learner.heartbeat()
        assert heartbeat.run_state is RunState.RUNNING
        assert heartbeat.committed_version == PolicyVersion(0, 0)

    with_mesh(body, num_workers=2)


def test_the_epoch_is_kept_while_nobody_joins_or_leaves(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.join("rollout-0")
        first = await mesh.begin(0)
        await mesh.finish(0)
        assert await mesh.begin(1) == first
        await mesh.finish(1)
        await mesh.join("rollout-1")
        larger = await mesh.begin(2)
        assert (larger.number, larger.world_size) == (first.number + 1, 3)

    with_mesh(body)


def test_the_first_publish_waits_for_all_workers_that_are_started(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.join("rollout-0")
        begin = asyncio.create_task(mesh.begin(0))
        await asyncio.sleep(0.3)
        assert not begin.done()
        await mesh.join("rollout-1")
        assert (await begin).world_size == 3

    with_mesh(body, num_workers=2)


def test_the_first_publish_goes_on_with_fewer_workers_once_the_start_timed_out(
    with_mesh: Callable[..., None],
) -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.join("rollout-0")
        assert (await mesh.begin(0)).world_size == 2

    with_mesh(body, num_workers=3, rollout={"start_timeout_s": 0.5})


def test_without_any_worker_the_publish_says_so(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        with pytest.raises(UnavailableError, match=r"no rollout worker registered within 0\.3 s"):
            await mesh.begin(0, timeout_s=2.0)

    with_mesh(body, rollout={"start_timeout_s": 0.3})


def test_a_worker_that_does_not_answer_prepare_is_left_out_and_gets_no_leases(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        frozen = await mesh.join("rollout-0", gates={"prepare": asyncio.Event()})
        ready = await mesh.join("rollout-1")
        outcome = await mesh.publish(0)
        assert outcome.members == ("rollout-1",)
        assert ready.servicer.steps() == ["prepare", "abort", "prepare", "receive", "commit"]
        assert ready.servicer.ranks == [2, 1]
        assert ready.servicer.epochs[1].world_size == 2
        assert ready.servicer.epochs[1].number > ready.servicer.epochs[0].number
        frozen.stream.grant(1)
        assert await frozen.gets_nothing()
        # It has sent no heartbeat since, so the next publish does not wait for it.
        assert (await mesh.publish(1)).members == ("rollout-1",)
        assert frozen.servicer.steps().count("prepare") == 1

    with_mesh(body, num_workers=2, weights={"prepare_timeout_s": 2.0})


def test_a_worker_that_was_left_out_is_back_with_the_next_version(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        gate = asyncio.Event()
        late = await mesh.join("rollout-0", gates={"prepare": gate})
        await mesh.join("rollout-1")
        await mesh.publish(0)
        gate.set()
        await late.client.heartbeat()
        assert (await mesh.publish(1)).members == ("rollout-0", "rollout-1")

    with_mesh(body, num_workers=2, weights={"prepare_timeout_s": 2.0})


def test_a_plan_that_no_worker_accepts_is_an_error(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.join("rollout-0", failures={"prepare": InvalidArgumentError("no tensor named weight", "plan")})
        with pytest.raises(WeightTransferError, match="rollout-0: no tensor named weight"):
            await mesh.begin(0)

    with_mesh(body)


def test_a_wrong_digest_aborts_on_all_and_the_old_version_stays(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        good, bad = await mesh.join("rollout-0"), await mesh.join("rollout-1")
        assert (await mesh.publish(0)).is_committed
        bad.servicer.digest = b"\x99" * 32
        outcome = await mesh.publish(1)
        assert not outcome.is_committed
        assert outcome.abort_reason == "rollout-1 received other bytes than were sent"
        for worker in (good, bad):
            assert worker.servicer.steps()[3:] == ["prepare", "receive", "abort"]
            assert worker.servicer.version == PolicyVersion(0, 0)
        assert (await mesh.learner.heartbeat()).committed_version == PolicyVersion(0, 0)

    with_mesh(body, num_workers=2)


def test_an_aborted_version_can_be_published_again_in_a_new_epoch(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0", digest=b"\x99" * 32)
        first = await mesh.begin(0)
        assert not (await mesh.finish(0)).is_committed
        worker.servicer.digest = b"\x11" * 32
        assert (await mesh.begin(0)).number == first.number + 1
        assert (await mesh.finish(0)).is_committed

    with_mesh(body)


def test_one_missing_digest_aborts(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0", num_ranks=2)
        worker.servicer.num_ranks = 1
        assert "1 digests for 2 processes" in (await mesh.publish(0)).abort_reason

    with_mesh(body)


def test_a_failed_receive_aborts_on_all(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        good = await mesh.join("rollout-0")
        await mesh.join("rollout-1", failures={"receive": WeightTransferError("a peer is gone")})
        outcome = await mesh.publish(0)
        assert not outcome.is_committed
        assert "rollout-1 did not receive the weights (a peer is gone)" in outcome.abort_reason
        assert good.servicer.steps() == ["prepare", "receive", "abort"]

    with_mesh(body, num_workers=2)


def test_a_learner_that_could_not_send_ends_the_receives_at_once(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0", gates={"receive": asyncio.Event()})
        await mesh.begin(0)
        await mesh.until(lambda: "receive" in worker.servicer.steps())
        outcome = await mesh.finish(0, digest=b"", failure="out of memory")
        assert outcome.abort_reason == "the learner could not send: out of memory"
        assert worker.servicer.steps() == ["prepare", "receive", "abort"]

    with_mesh(body)


def test_a_worker_that_cannot_load_is_dropped_and_the_others_serve(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        broken = await mesh.join("rollout-0", failures={"commit": TaintedError("no such layer")})
        healthy = await mesh.join("rollout-1")
        outcome = await mesh.publish(0)
        assert outcome.is_committed
        assert outcome.members == ("rollout-1",)
        with pytest.raises(SupersededError, match="start the process anew"):
            await broken.client.register(mesh.config.run.name, Role.ROLLOUT, broken.address, 1)
        await broken.client.leave("could not load")
        assert mesh.coordinator.run.state is RunState.RUNNING
        assert (await healthy.take(1))[0].group_id.startswith("train:0:")

    with_mesh(body, num_workers=2)


def test_the_run_waits_for_a_new_worker_when_no_worker_is_left_that_serves(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.join("rollout-0", failures={"commit": TaintedError("no such layer")})
        outcome = await mesh.publish(0)
        assert not outcome.is_committed
        assert "rollout-0: no such layer" in outcome.abort_reason
        assert mesh.coordinator.run.failure == ""
        await mesh.join("rollout-0")
        assert (await mesh.publish(1)).members == ("rollout-0",)

    with_mesh(body)


def test_repeated_calls_get_the_first_answer_and_reach_the_workers_once(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0")
        epochs = await asyncio.gather(mesh.begin(0), mesh.begin(0), mesh.begin(0))
        assert len(set(epochs)) == 1
        outcomes = await asyncio.gather(mesh.finish(0), mesh.finish(0))
        assert outcomes[0] == outcomes[1] == await mesh.finish(0)
        with pytest.raises(SupersededError, match="serves already"):
            await mesh.begin(0)
        assert worker.servicer.steps() == ["prepare", "receive", "commit"]

    with_mesh(body)


def test_a_begin_whose_caller_gave_up_is_joined_by_the_next_one(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        gate = asyncio.Event()
        worker = await mesh.join("rollout-0", gates={"prepare": gate})
        with pytest.raises(Exception, match=r"(?i)deadline"):
            await mesh.begin(0, timeout_s=0.2)
        gate.set()
        await mesh.begin(0)
        assert worker.servicer.steps().count("prepare") == 1

    with_mesh(body)


def test_a_version_that_the_learner_left_is_aborted_when_the_next_begins(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0", gates={"receive": asyncio.Event()})
        await mesh.begin(0)
        await mesh.until(lambda: "receive" in worker.servicer.steps())
        worker.servicer.gates = {}
        await mesh.begin(1)
        assert worker.servicer.calls[:4] == [
            ("prepare", "0.0"),
            ("receive", "0.0"),
            ("abort", "0.0"),
            ("prepare", "0.1"),
        ]
        assert (await mesh.finish(1)).is_committed

    with_mesh(body)


def test_an_old_version_cannot_be_published_and_an_unknown_one_not_finished(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        await mesh.join("rollout-0")
        await mesh.publish(5)
        with pytest.raises(SupersededError, match=r"version 0\.5 serves"):
            await mesh.begin(4)
        with pytest.raises(SupersededError, match="begin it first"):
            await mesh.finish(6)

    with_mesh(body)


def test_only_the_learner_publishes(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        worker = await mesh.join("rollout-0")
        mesh.learner = worker.client
        with pytest.raises(InvalidArgumentError, match="only the learner"):
            await mesh.begin(0)

    with_mesh(body)


def test_a_second_learner_is_refused(with_mesh: Callable[..., None]) -> None:
    async def body(mesh: Mesh) -> None:
        async with CoordinatorClient(mesh.address, "learner-2") as second:
            with pytest.raises(InvalidArgumentError, match="a second learner cannot join"):
                await second.register(mesh.config.run.name, Role.LEARNER, "127.0.0.1:1")

    with_mesh(body)
