"""The weight protocol bears calls in the wrong order, repeated calls, late calls, and a load that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rollmesh.errors import InvalidArgumentError, SupersededError, TaintedError, WeightTransferError
from rollmesh.types import PolicyVersion, TensorSpec, WeightEpoch, WeightPlan
from services.rollout.weight_protocol import WeightProtocol
from tests.fakes.engine import FakeEngine
from tests.fakes.waiting import until

V1, V2 = PolicyVersion(0, 1), PolicyVersion(0, 2)
PLAN = WeightPlan((TensorSpec("w", "float32", (2,)),), (0,), b"p" * 32)
EPOCH = WeightEpoch(1, "127.0.0.1", 1234, 2)


def run(scenario: Callable[[WeightProtocol, FakeEngine], Awaitable[None]]) -> FakeEngine:
    """Run a scenario on a new protocol, and check that the protocol leaves no task behind."""

    async def main() -> FakeEngine:
        engine = FakeEngine(version=None)
        protocol = WeightProtocol(engine)
        await asyncio.wait_for(scenario(protocol, engine), 30.0)
        await protocol.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return engine

    return asyncio.run(main())


async def prepare(protocol: WeightProtocol, version: PolicyVersion, epoch: WeightEpoch = EPOCH) -> None:
    await protocol.prepare(version, PLAN, epoch, 1, 10.0)


def test_a_version_serves_after_prepare_receive_commit() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        assert (await protocol.receive(V1)).digests == (b"d" * 32,)
        assert engine.version is None
        assert (await protocol.commit(V1)).pause_s == 0.02
        assert engine.version == V1

    assert run(scenario).steps == ["prepare", "receive", "commit"]


def test_every_call_may_be_repeated_and_answers_the_same() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        await prepare(protocol, V1)
        assert await protocol.receive(V1) == await protocol.receive(V1)
        await prepare(protocol, V1)
        assert await protocol.commit(V1) == await protocol.commit(V1)
        await protocol.receive(V1)
        await prepare(protocol, V1)
        await protocol.abort(V1, "too late")
        assert engine.version == V1

    assert run(scenario).steps == ["prepare", "receive", "commit"]


def test_concurrent_repetitions_share_one_step() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        engine.gates["receive"] = asyncio.Event()
        await prepare(protocol, V1)
        calls = [asyncio.ensure_future(protocol.receive(V1)) for _ in range(3)]
        await until(lambda: "receive" in engine.steps)
        engine.gates["receive"].set()
        assert len(set(await asyncio.gather(*calls))) == 1

    assert run(scenario).steps == ["prepare", "receive"]


def test_a_step_survives_the_caller_that_began_it() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        engine.gates["receive"] = asyncio.Event()
        await prepare(protocol, V1)
        gone = asyncio.ensure_future(protocol.receive(V1))
        await until(lambda: "receive" in engine.steps)
        gone.cancel()
        engine.gates["receive"].set()
        assert (await protocol.receive(V1)).num_bytes == 1024

    assert run(scenario).steps == ["prepare", "receive"]


@pytest.mark.parametrize("step", ["receive", "commit"])
def test_a_version_that_is_not_in_preparation_is_superseded(step: str) -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        with pytest.raises(SupersededError, match=r"version 0.1 is not in preparation \(current: none\)"):
            await getattr(protocol, step)(V1)
        await prepare(protocol, V2)
        with pytest.raises(SupersededError, match=r"current: 0.2"):
            await getattr(protocol, step)(V1)

    run(scenario)


def test_an_older_version_than_the_current_cannot_be_prepared() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V2)
        with pytest.raises(SupersededError):
            await prepare(protocol, V1)
        await protocol.receive(V2)
        await protocol.commit(V2)
        with pytest.raises(SupersededError):
            await prepare(protocol, V1)

    run(scenario)


def test_calls_out_of_order_are_refused() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        with pytest.raises(InvalidArgumentError, match="ReceiveWeights has not answered"):
            await protocol.commit(V1)
        engine.gates["prepare"] = asyncio.Event()
        preparing = asyncio.ensure_future(prepare(protocol, V2))
        await until(lambda: engine.steps.count("prepare") == 2)
        with pytest.raises(InvalidArgumentError, match="PrepareWeights has not answered"):
            await protocol.receive(V2)
        engine.gates["prepare"].set()
        await preparing

    run(scenario)


def test_an_abort_ends_a_transfer_under_way_and_the_old_version_serves_on() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        await protocol.receive(V1)
        await protocol.commit(V1)
        engine.gates["receive"] = asyncio.Event()
        await prepare(protocol, V2)
        receiving = asyncio.ensure_future(protocol.receive(V2))
        await until(lambda: engine.steps.count("receive") == 2)
        await protocol.abort(V2, "the learner is gone")
        with pytest.raises(SupersededError, match=r"receive version 0\.2 was given up"):
            await receiving
        with pytest.raises(SupersededError):
            await protocol.commit(V2)
        assert engine.version == V1
        await protocol.abort(V2, "again")

    assert run(scenario).steps == ["prepare", "receive", "commit", "prepare", "receive", "abort"]


def test_an_aborted_version_can_be_prepared_again() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        await protocol.abort(V1, "digest differs")
        await prepare(protocol, V1)
        await protocol.receive(V1)
        await protocol.commit(V1)
        assert engine.version == V1

    assert run(scenario).steps == ["prepare", "abort", "prepare", "receive", "commit"]


def test_a_newer_version_takes_the_place_of_one_in_preparation() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        await prepare(protocol, V2)
        with pytest.raises(SupersededError):
            await protocol.receive(V1)
        await protocol.receive(V2)

    assert run(scenario).steps == ["prepare", "abort", "prepare", "receive"]


def test_the_same_version_in_another_epoch_is_a_new_preparation() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        await prepare(protocol, V1, WeightEpoch(2, "127.0.0.1", 1234, 3))
        await protocol.receive(V1)

    assert run(scenario).steps == ["prepare", "abort", "prepare", "receive"]


def test_a_transfer_that_failed_can_be_prepared_again_and_taints_nobody() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        engine.failures["receive"] = WeightTransferError("connection reset")
        await prepare(protocol, V1)
        for _ in range(2):
            with pytest.raises(WeightTransferError, match="connection reset"):
                await protocol.receive(V1)
        with pytest.raises(WeightTransferError, match="connection reset"):
            await protocol.commit(V1)
        assert not protocol.is_tainted
        del engine.failures["receive"]
        await prepare(protocol, V1)
        await protocol.receive(V1)

    assert run(scenario).steps == ["prepare", "receive", "abort", "prepare", "receive"]


def test_a_failed_commit_taints_the_worker_for_good_and_tells_its_owner() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        watching = asyncio.ensure_future(protocol.watch())
        await prepare(protocol, V1)
        await protocol.receive(V1)
        await asyncio.sleep(0)
        assert not watching.done()
        engine.failures["commit"] = RuntimeError("shape mismatch")
        for _ in range(2):
            with pytest.raises(TaintedError, match="shape mismatch"):
                await protocol.commit(V1)
        with pytest.raises(TaintedError, match=r"commit version 0.1 failed.*shape mismatch"):
            await watching
        assert protocol.is_tainted
        with pytest.raises(TaintedError):
            await prepare(protocol, V2)

    run(scenario)


def test_a_refusal_to_load_leaves_the_old_version_serving_and_the_next_one_possible() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        await prepare(protocol, V1)
        await protocol.receive(V1)
        engine.failures["commit"] = WeightTransferError("the received bytes are gone")
        for _ in range(2):
            with pytest.raises(WeightTransferError, match="the received bytes are gone"):
                await protocol.commit(V1)
        assert not protocol.is_tainted
        engine.failures.clear()
        await prepare(protocol, V2)
        await protocol.receive(V2)
        await protocol.commit(V2)
        assert engine.version == V2

    assert run(scenario).steps == ["prepare", "receive", "commit", "abort", "prepare", "receive", "commit"]


def test_an_abort_does_not_touch_a_version_that_is_being_loaded() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        engine.gates["commit"] = asyncio.Event()
        await prepare(protocol, V1)
        await protocol.receive(V1)
        committing = asyncio.ensure_future(protocol.commit(V1))
        await until(lambda: "commit" in engine.steps)
        await protocol.abort(V1, "too late")
        engine.gates["commit"].set()
        await committing
        assert engine.version == V1

    assert "abort" not in run(scenario).steps


def test_the_next_preparation_waits_for_a_version_that_is_being_loaded() -> None:
    async def scenario(protocol: WeightProtocol, engine: FakeEngine) -> None:
        engine.gates["commit"] = asyncio.Event()
        await prepare(protocol, V1)
        await protocol.receive(V1)
        committing = asyncio.ensure_future(protocol.commit(V1))
        await until(lambda: "commit" in engine.steps)
        preparing = asyncio.ensure_future(prepare(protocol, V2))
        await asyncio.sleep(0.02)
        assert engine.steps.count("prepare") == 1
        engine.gates["commit"].set()
        await asyncio.gather(committing, preparing)
        assert engine.version == V1

    assert run(scenario).steps == ["prepare", "receive", "commit", "prepare"]
