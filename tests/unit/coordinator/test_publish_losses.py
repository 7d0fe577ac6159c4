"""Publishing over connections that lose calls, in virtual time: nobody is banned for a lost connection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping

import pytest

from rollmesh.errors import RollMeshError, TaintedError, UnavailableError
from rollmesh.types import Announcement, MemberReport, PolicyVersion, PublishOutcome, Role, TensorSpec, WeightPlan
from services.coordinator.members import Member, Members
from services.coordinator.publish import PublishDriver, PublishSettings
from services.coordinator.versions import VersionBook
from tests.fakes.lossy_peer import Loss, LossyPeer
from tests.fakes.virtual_time import run_virtual

PLAN = WeightPlan((TensorSpec("w", "float32", (2,)),), (0,), b"p" * 32)
DIGEST = b"d" * 32
OLD, NEW, NEXT = (PolicyVersion(0, number) for number in range(3))
COMMIT_TIMEOUT_S = 60.0
SETTINGS = PublishSettings(
    num_workers=1, start_timeout_s=30.0, prepare_timeout_s=60.0, commit_timeout_s=COMMIT_TIMEOUT_S
)


class Mesh:
    """A publish driver, its members, and their peers by name; the members beat only if told to."""

    def __init__(self, peers: Mapping[str, LossyPeer]) -> None:
        clock = asyncio.get_running_loop().time
        self.peers = dict(peers)
        self.members = Members(1e9, clock)
        self.versions = VersionBook()
        self.tainted: list[str] = []
        self.unpinned: list[Exception] = []
        self.recorded: list[tuple[PolicyVersion, int]] = []
        self.is_redis_away = False
        for name in self.peers:
            self.members.register(name, Role.ROLLOUT, f"{name}-1", name, 1)
        self.publish_driver = PublishDriver(
            self.members,
            self.versions,
            SETTINGS,
            lambda address: self.peers[address],
            self._until_unpinned,
            self._before_commit,
            lambda version, step: None,
            self._on_tainted,
            clock,
        )

    async def publish(self, version: PolicyVersion) -> PublishOutcome:
        await self.begin(version)
        return await self.publish_driver.finish(version, DIGEST)

    async def begin(self, version: PolicyVersion) -> None:
        for member in self.members.rollouts:
            await asyncio.sleep(0.001)
            self.members.heartbeat(member.name, member.incarnation, MemberReport())
        await self.publish_driver.begin(
            Announcement(version, version.number, PLAN, "127.0.0.1", 29500, 30.0), "learner-1"
        )

    def version_of(self, name: str) -> PolicyVersion | None:
        member = self.members.get(name)
        return None if member is None else member.version

    async def _until_unpinned(self) -> None:
        if self.unpinned:
            raise self.unpinned.pop()

    async def _before_commit(self, version: PolicyVersion, step: int) -> None:
        is_known = (version, step) in self.recorded
        assert is_known or all(peer.engine.version != version for peer in self.peers.values()), "recorded too late"
        if self.is_redis_away:
            raise UnavailableError("Redis does not answer")
        self.recorded.append((version, step))

    async def _on_tainted(self, member: Member, reason: str) -> None:
        self.tainted.append(member.name)
        self.members.remove(member.name, member.incarnation, is_banned=True)


def run(scenario: Callable[[Mesh], Awaitable[None]], *names: str) -> Mesh:
    """Publishes version 0.0 on healthy workers before the scenario begins."""

    async def main() -> Mesh:
        mesh = Mesh({name: LossyPeer() for name in names or ("a", "b")})
        assert (await mesh.publish(OLD)).members == tuple(sorted(mesh.peers))
        await scenario(mesh)
        await mesh.publish_driver.close()
        for peer in mesh.peers.values():
            await peer.protocol.close()
        return mesh

    return run_virtual(main())


def losing(step: str, *losses: Loss) -> Callable[[str, int], Loss]:
    """Lose the next calls of one step, one after the other."""
    left = list(losses)
    return lambda called, _: left.pop(0) if called == step and left else Loss.NONE


@pytest.mark.parametrize("step", ["prepare", "receive", "commit"])
@pytest.mark.parametrize(
    "losses",
    [(Loss.REQUEST,), (Loss.ANSWER,), (Loss.REQUEST, Loss.ANSWER), (Loss.ANSWER, Loss.ANSWER)],
    ids=lambda losses: "+".join(loss.name for loss in losses),
)
def test_a_connection_that_comes_back_costs_nothing_but_time(step: str, losses: tuple[Loss, ...]) -> None:
    async def scenario(mesh: Mesh) -> None:
        mesh.peers["a"].loss = losing(step, *losses)
        outcome = await mesh.publish(NEW)
        assert outcome.members == ("a", "b")
        assert mesh.tainted == []
        assert mesh.peers["a"].num_calls[step] == 2 + len(losses)
        assert mesh.peers["a"].engine.steps.count("commit") == 2
        assert asyncio.get_running_loop().time() < 5

    run(scenario)


@pytest.mark.parametrize("loss", [Loss.REQUEST, Loss.ANSWER, Loss.SILENCE])
def test_a_worker_whose_commit_is_not_known_at_the_deadline_is_left_out_of_this_version_alone(loss: Loss) -> None:
    async def scenario(mesh: Mesh) -> None:
        worker = mesh.peers["a"]
        worker.loss = lambda step, _: loss if step == "commit" else Loss.NONE
        outcome = await mesh.publish(NEW)
        assert outcome.members == ("b",)
        assert asyncio.get_running_loop().time() == pytest.approx(COMMIT_TIMEOUT_S, abs=3)
        assert mesh.version_of("a") is None
        assert worker.engine.version == (NEW if loss is Loss.ANSWER else OLD)
        worker.loss = losing("")
        assert (await mesh.publish(NEXT)).members == ("a", "b")
        assert mesh.version_of("a") == worker.engine.version == NEXT
        assert mesh.tainted == []

    run(scenario)


def test_a_version_whose_only_commit_is_not_known_is_published_again() -> None:
    async def scenario(mesh: Mesh) -> None:
        worker = mesh.peers["a"]
        worker.loss = lambda step, _: Loss.ANSWER if step == "commit" else Loss.NONE
        outcome = await mesh.publish(NEW)
        assert not outcome.is_committed
        assert "no worker is known to serve the version" in outcome.abort_reason
        worker.loss = losing("")
        assert (await mesh.publish(NEW)).members == ("a",)

    assert run(scenario, "a").tainted == []


def test_the_server_says_when_it_wants_to_be_asked_again() -> None:
    async def scenario(mesh: Mesh) -> None:
        worker = mesh.peers["a"]
        worker.retry_after_s, worker.loss = 7.0, losing("commit", Loss.REQUEST)
        assert (await mesh.publish(NEW)).members == ("a", "b")
        first, second = worker.called_s["commit"][1:]
        assert second - first == pytest.approx(7.0)

    run(scenario)


def test_a_failed_load_taints_even_where_its_first_answer_was_lost() -> None:
    async def scenario(mesh: Mesh) -> None:
        worker = mesh.peers["a"]
        worker.engine.failures["commit"] = TaintedError("shape mismatch in layer 3")
        worker.loss = losing("commit", Loss.REQUEST)
        assert (await mesh.publish(NEW)).members == ("b",)
        assert mesh.tainted == ["a"]
        assert worker.protocol.is_tainted

    run(scenario)


def test_a_load_whose_failure_never_arrived_taints_at_the_next_preparation() -> None:
    async def scenario(mesh: Mesh) -> None:
        worker = mesh.peers["a"]

        async def fail_unheard(version: PolicyVersion, *, timeout_s: float) -> None:
            worker.engine.failures["commit"] = TaintedError("shape mismatch in layer 3")
            with pytest.raises(TaintedError):
                await worker.protocol.commit(version)
            raise UnavailableError("connection reset")

        worker.commit = fail_unheard  # type: ignore[method-assign, assignment]
        assert (await mesh.publish(NEW)).members == ("b",)
        assert mesh.tainted == []
        assert (await mesh.publish(NEXT)).members == ("b",)
        assert mesh.tainted == ["a"]

    run(scenario)


def test_a_refusal_to_load_that_leaves_the_old_weights_in_place_taints_nobody() -> None:
    async def scenario(mesh: Mesh) -> None:
        worker = mesh.peers["a"]
        worker.engine.failures["commit"] = RollMeshError("the received bytes are gone")
        assert (await mesh.publish(NEW)).members == ("b",)
        assert mesh.tainted == []
        assert not worker.protocol.is_tainted
        assert worker.engine.version == OLD
        worker.engine.failures.clear()
        assert (await mesh.publish(NEXT)).members == ("a", "b")

    run(scenario)


def test_a_worker_that_is_no_member_any_more_is_not_waited_for() -> None:
    async def scenario(mesh: Mesh) -> None:
        mesh.peers["a"].loss = lambda step, _: Loss.REQUEST if step == "commit" else Loss.NONE
        await mesh.begin(NEW)
        finishing = asyncio.ensure_future(mesh.publish_driver.finish(NEW, DIGEST))
        await asyncio.sleep(10.0)
        mesh.members.remove("a", "a-1")
        assert (await finishing).members == ("b",)
        assert asyncio.get_running_loop().time() < 15

    run(scenario)


def test_a_worker_that_died_before_prepare_holds_the_others_up_for_seconds_only() -> None:
    async def scenario(mesh: Mesh) -> None:
        mesh.peers["a"].loss = lambda step, _: Loss.REQUEST
        assert (await mesh.publish(NEW)).members == ("b",)
        assert asyncio.get_running_loop().time() < 10

    run(scenario)


def test_a_failure_to_begin_is_not_remembered_as_the_answer_to_the_next_call() -> None:
    async def scenario(mesh: Mesh) -> None:
        mesh.unpinned.append(UnavailableError("Redis is away"))
        gone = asyncio.ensure_future(mesh.begin(NEW))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(1.0)
        assert mesh.publish_driver.stage == ""
        assert (await mesh.publish(NEW)).members == ("a", "b")

    run(scenario)


def test_a_begin_that_fails_by_a_fault_of_ours_can_be_begun_again() -> None:
    async def scenario(mesh: Mesh) -> None:
        mesh.unpinned.append(RuntimeError("a fault of ours"))
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await mesh.begin(NEW)
        with pytest.raises(RollMeshError, match="begin it first"):
            await mesh.publish_driver.finish(NEW, DIGEST)
        assert (await mesh.publish(NEW)).members == ("a", "b")

    run(scenario)


@pytest.mark.parametrize("seed", range(100))
def test_whatever_is_lost_every_worker_holds_one_version_exactly_or_failed_to_load(seed: int) -> None:
    """Calls are lost at random and loads fail now and then; three publishes, then one over sound connections."""
    chance = random.Random(seed)
    rate = chance.choice([0.1, 0.4, 0.8])

    def lose(step: str, call: int) -> Loss:
        return chance.choice([Loss.REQUEST, Loss.ANSWER, Loss.SILENCE]) if chance.random() < rate else Loss.NONE

    async def scenario(mesh: Mesh) -> None:
        last = OLD
        for peer in mesh.peers.values():
            peer.loss = lose
            if chance.random() < 0.2:
                peer.engine.failures["commit"] = TaintedError("out of memory")
        for number in range(1, 4):
            version, committed = PolicyVersion(0, number), mesh.versions.committed
            try:
                outcome = await mesh.publish(version)
            except RollMeshError:
                assert mesh.versions.committed == committed
                continue
            assert (mesh.versions.committed == version) == outcome.is_committed
            last = version
            check(mesh, outcome.members, version)
        for peer in mesh.peers.values():
            peer.loss = losing("")
            peer.engine.failures.clear()
        sound = {name for name, peer in mesh.peers.items() if not peer.protocol.is_tainted}
        if sound and mesh.members.rollouts:
            assert set((await mesh.publish(PolicyVersion(0, last.number + 4))).members) == sound

    def check(mesh: Mesh, members: tuple[str, ...], version: PolicyVersion) -> None:
        for name, peer in mesh.peers.items():
            engine = peer.engine
            assert name not in mesh.tainted or peer.protocol.is_tainted, f"{name} was banned without a failed load"
            if name in members:
                assert engine.version == version
            if not peer.protocol.is_tainted:
                assert engine.version is not None
                assert engine.version <= version
                assert mesh.version_of(name) in (None, engine.version)

    run(scenario, "a", "b", "c")


def test_a_version_is_recorded_before_the_first_worker_loads_it_and_loaded_by_none_where_that_fails() -> None:
    async def scenario(mesh: Mesh) -> None:
        mesh.is_redis_away = True
        outcome = await mesh.publish(NEW)
        assert outcome.abort_reason == "the version could not be recorded: Redis does not answer"
        assert [peer.engine.version for peer in mesh.peers.values()] == [OLD, OLD]
        mesh.is_redis_away = False
        assert (await mesh.publish(NEW)).members == ("a", "b")
        assert mesh.recorded == [(OLD, OLD.number), (NEW, NEW.number)]

    run(scenario)
