"""The coordinator's decisions. The servicer calls them for members, and the watch calls them as time passes.

This module knows no protobuf and no gRPC. One event loop runs all code, so that nothing changes between two awaits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from rollmesh.errors import ConfigError, InvalidArgumentError, RunEndedError, UnavailableError
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.ledger import RecordedVersion
from rollmesh.rpc.channel import parse_address
from rollmesh.types import (
    Announcement,
    EvaluationSample,
    GroupState,
    Heartbeat,
    MemberReport,
    MemberStatus,
    MeshStatus,
    PolicyVersion,
    PublishOutcome,
    Registration,
    Role,
    RunState,
    WeightEpoch,
)
from services.coordinator.admission import Admission
from services.coordinator.evaluation import Evaluator
from services.coordinator.leases import Dispatcher, LeaseLine
from services.coordinator.members import Member, Members, heartbeat_interval_s
from services.coordinator.publish import PublishDriver
from services.coordinator.renewals import Renewals
from services.coordinator.run import Run
from services.coordinator.token_meter import TokenMeter
from services.coordinator.waiting import View, waiting_for

logger = logging.getLogger(__name__)

REFRESH_TIMEOUT_S = 1.0
MAX_FAILURE_CHARS = 2000
"""The longest reason of a failure: every heartbeat carries the reason."""
QUIET_S = 5.0
"""Seconds without progress after which a status says who waits for whom."""


class Coordinator:
    """Connects the coordinator's objects. Each rule lives in one of these objects.

    Attributes:
        quiet_s: seconds for which nothing has moved; the watch writes it.
    """

    def __init__(
        self,
        run: Run,
        members: Members,
        ledger: CoordinatorLedger,
        admission: Admission,
        dispatcher: Dispatcher,
        renewals: Renewals,
        publish_driver: PublishDriver,
        evaluator: Evaluator | None,
        meter: TokenMeter,
        heartbeat_interval_s: float,
        member_timeout_s: float,
        lease_ttl_s: float,
    ) -> None:
        self.run = run
        self.members = members
        self.dispatcher = dispatcher
        self.renewals = renewals
        self.publish_driver = publish_driver
        self.evaluator = evaluator
        self.quiet_s = 0.0
        self._ledger = ledger
        self._admission = admission
        self._meter = meter
        self._heartbeat_interval_s = heartbeat_interval_s
        self._member_timeout_s = member_timeout_s
        self._silence_s = min(member_timeout_s, lease_ttl_s)
        self._to_revoke: set[str] = set()
        self._excused: set[str] = set()
        """Names in `_to_revoke` whose groups are not to blame: these leases do not count as failed attempts."""
        self._unclaimed: set[str] = set()
        self._num_leases: Counter[str] = Counter()

    async def register(
        self,
        run_id: str,
        role: Role,
        name: str,
        incarnation: str,
        address: str,
        num_weight_ranks: int,
        serving: PolicyVersion | None = None,
    ) -> Registration:
        """Add a member. Repeating the call is harmless; a new incarnation replaces the old incarnation.

        Raises:
            InvalidArgumentError: the run id is another run's, the address is not an address, or the member is refused.
            RunEndedError: the run is over.
            SupersededError: another process has taken over the name.
            UnavailableError: the leases of the old incarnation could not be revoked yet.
        """
        self._require_run(run_id)
        _check_address(address)
        if self.run.state.is_over:
            raise RunEndedError(self.run.failure or "the run is finished")
        known = self.members.get(name)
        if name in self._to_revoke or (known is not None and known.incarnation != incarnation):
            await self._ledger.revoke_member(name, is_excused=name in self._excused)
            self._to_revoke.discard(name)
            self._excused.discard(name)
        await self._claim_leases(name, serving)
        _, former = self.members.register(name, role, incarnation, address, num_weight_ranks, serving)
        if role is Role.LEARNER:
            await self.publish_driver.give_up_others(incarnation)
        if former is not None:
            logger.warning("%s started anew", name, extra={"member": name})
            self._detach(former)
        elif known is None:
            logger.info("%s joined from %s", name, address or "an unnamed address", extra={"member": name})
        self.dispatcher.wake()
        newest = await self._ledger.newest_version() if role is Role.LEARNER else None
        return Registration(
            heartbeat_interval_s=self._heartbeat_interval_s,
            member_timeout_s=self._member_timeout_s,
            committed_version=self.run.committed_version,
            groups_per_batch=self._admission.groups_per_batch,
            num_steps=self._admission.num_steps,
            newest_version=None if newest is None else newest.version,
        )

    def restore(self, newest: RecordedVersion | None, holders: Iterable[str]) -> None:
        """Go on after an earlier coordinator of the run. Call this before the first member registers.

        The newest recorded version counts as committed, also if the earlier coordinator did not come to load it
        everywhere. A worker that does not serve the version gets no lease until the learner has published it again.

        Args:
            newest: the newest version in the ledger, with its step; None in a new run.
            holders: the names of the members that hold leases. They go on with their leases if they register again as
                members that serve a version. Otherwise the leases end, see `drop_silent`.
        """
        self._unclaimed = set(holders)
        if newest is not None:
            self.publish_driver.restore(newest.version)
            self.on_commit(newest.version, newest.step)

    async def _claim_leases(self, name: str, serving: PolicyVersion | None) -> None:
        """Let a worker that registers go on with the leases of its name, or end them if its engine is a new one.

        Raises:
            UnavailableError: Redis is away.
        """
        if name in self._unclaimed and serving is None:
            await self._ledger.revoke_member(name, is_excused=True)
        self._unclaimed.discard(name)

    def _require_run(self, run_id: str) -> None:
        if run_id != self.run.run_id:
            raise InvalidArgumentError(
                f"this is run {self.run.run_id!r}, not {run_id!r}; check the addresses", "run_id"
            )

    def heartbeat(self, name: str, incarnation: str, report: MemberReport) -> Heartbeat:
        """Record that a member lives and how its work moves, and return the state of the run.

        Raises:
            UnknownMemberError: this incarnation is not a member.
        """
        member = self.members.heartbeat(name, incarnation, report)
        self.renewals.ask(member, report.renewals)
        ended, member.ended_leases = tuple(member.ended_leases), []
        return Heartbeat(
            run_state=self.run.state,
            committed_version=self.run.committed_version,
            failure=self.run.failure,
            ended=ended,
            interval_s=heartbeat_interval_s(len(self.members), self._heartbeat_interval_s, self._silence_s),
            should_publish=member.role is Role.LEARNER and self._is_publish_wanted,
        )

    @property
    def _is_publish_wanted(self) -> bool:
        """Whether a rollout worker waits for the committed version, which no publish under way brings."""
        if self.run.committed_version is None or self.run.state.is_over or not self.publish_driver.is_idle:
            return False
        rollouts = self.members.rollouts
        return any(member.may_be_tried and not self.dispatcher.is_serving(member) for member in rollouts)

    async def leave(self, name: str, incarnation: str, failure: str, *, is_replaceable: bool = False) -> None:
        """Remove a member that leaves. This never fails.

        The run fails if the member failed, or if a learner leaves before its last step. The run goes on if a new
        process may take the member's place.
        """
        member = self.members.remove(name, incarnation)
        if member is None:
            return
        logger.info("%s left%s", name, f": {failure}" if failure else "", extra={"member": name})
        # The run fails before anything waits: when the caller's deadline passes, gRPC cancels this handler, and the
        # caller does not call again.
        if is_replaceable:
            self._excused.add(name)
        elif failure:
            self.fail(f"{name}: {failure}")
        elif member.role is Role.LEARNER and self.run.state in (RunState.STARTING, RunState.RUNNING):
            self.fail(f"{name} left before its last step")
        await self._lose(member)

    def open_line(self, name: str, incarnation: str) -> LeaseLine:
        """Begin a worker's lease stream.

        Raises:
            UnknownMemberError: this incarnation is not a member.
            InvalidArgumentError: the member does not generate.
            RunEndedError: the run is over.
        """
        member = self.members.require(name, incarnation)
        if member.role is not Role.ROLLOUT:
            raise InvalidArgumentError(f"{name!r} is a {member.role.value} member; only rollout workers lease", "name")
        if self.run.state.is_over:
            raise RunEndedError(self.run.failure or "the run is finished")
        return self.dispatcher.open_line(member)

    def report_evaluation(
        self,
        name: str,
        incarnation: str,
        group_id: str,
        fencing_token: int,
        samples: Sequence[EvaluationSample],
        failure: str,
    ) -> None:
        """Record the result of one evaluation lease. Repeating the report, or reporting an old lease, is harmless.

        Raises:
            UnknownMemberError: this incarnation is not a member.
        """
        self.members.require(name, incarnation)
        if self.evaluator is not None:
            self.evaluator.report(group_id, fencing_token, samples, failure)
        self._finish_if_done()
        self.dispatcher.wake()

    async def begin_publish(self, name: str, incarnation: str, announcement: Announcement) -> WeightEpoch:
        """See `PublishDriver.begin`. Also raises UnknownMemberError, InvalidArgumentError and RunEndedError."""
        self._require_learner(name, incarnation)
        if self.run.state.is_over:
            raise RunEndedError(self.run.failure or "the run is finished")
        return await self.publish_driver.begin(announcement, incarnation)

    async def finish_publish(
        self, name: str, incarnation: str, version: PolicyVersion, digest: bytes, failure: str
    ) -> PublishOutcome:
        """See `PublishDriver.finish`. Also raises UnknownMemberError and InvalidArgumentError."""
        self._require_learner(name, incarnation)
        return await self.publish_driver.finish(version, digest, failure)

    def report_step(self, name: str, incarnation: str, step: int, metrics: Mapping[str, float], is_last: bool) -> None:
        """Record the learner's metrics of one step. Repeating the report is harmless.

        Raises:
            UnknownMemberError: this incarnation is not a member.
            InvalidArgumentError: the member is not the learner.
        """
        self._require_learner(name, incarnation)
        self.run.report_step(step, metrics, is_last)
        if is_last and self.evaluator is not None:
            self.evaluator.on_last_step(self.run.committed_version, self.run.committed_step)
        self._finish_if_done()
        self.dispatcher.wake()

    async def before_commit(self, version: PolicyVersion, step: int) -> None:
        """Record a version, which ``step`` made, before the first engine loads the version. For the `PublishDriver`.

        Raises:
            UnavailableError: Redis is away. A learner that resumes would not know that tokens of the version exist.
        """
        await self._ledger.record_version(version, step)

    def on_commit(self, version: PolicyVersion, step: int) -> None:
        """Record that a version, which ``step`` made, serves now. For the `PublishDriver`."""
        self.run.commit(version, step)
        if self.evaluator is not None:
            self.evaluator.on_commit(version, step)
        self.dispatcher.on_commit()

    async def on_tainted(self, member: Member, reason: str) -> None:
        """Drop a member whose load failed midway. For the `PublishDriver`.

        The process of the member ends, and a new process may take the member's place.
        """
        logger.error("dropped %s: %s", member.name, reason, extra={"member": member.name})
        if self.members.remove(member.name, member.incarnation, is_banned=True) is not None:
            self._excused.add(member.name)
            await self._lose(member)

    def expire_evaluation(self) -> None:
        """End the evaluation leases whose time is up, and a run that waited only for the last of them."""
        if self.evaluator is not None:
            self.evaluator.expire()
        self._finish_if_done()

    async def drop_silent(self) -> None:
        """Remove the members that missed their heartbeats, and revoke their leases.

        The run goes on without a learner: a learner that starts anew goes on from a checkpoint. Meanwhile the workers
        fill the slots. If no learner comes, nothing moves, and the watch fails the run after its stall timeout.
        """
        for member in self.members.silent():
            logger.warning("dropped %s, which fell silent", member.name, extra={"member": member.name})
            self.members.remove(member.name, member.incarnation)
            await self._lose(member)
        if self._unclaimed and self.members.age_s > self._member_timeout_s:
            logger.warning("%s did not come back to this coordinator", ", ".join(sorted(self._unclaimed)))
            self._to_revoke |= self._unclaimed
            self._excused |= self._unclaimed
            self._unclaimed.clear()
        for name in sorted(self._to_revoke):
            await self._revoke(name)

    def fail_run(self, run_id: str, reason: str) -> None:
        """Fail the run, because the launcher says that the run cannot go on. Only the first reason is kept.

        Raises:
            InvalidArgumentError: the coordinator serves another run.
        """
        self._require_run(run_id)
        self.fail(reason)

    def fail(self, reason: str) -> None:
        """Fail the run: heartbeats tell all members, and no member gets another lease."""
        self.run.fail(" ".join(reason.split())[:MAX_FAILURE_CHARS])
        self.dispatcher.close_all()

    def observe(self) -> None:
        """Record the running total of generated tokens, for the speed of generation."""
        self._meter.observe(self.members.num_generated_tokens)

    def progress_mark(self) -> Hashable:
        """Return a value that changes whenever something moves.

        Groups, tokens, steps, versions and evaluations may move, and so may the work that members report.
        """
        snapshot = self.dispatcher.snapshot
        return (
            self.run.state,
            self.run.step,
            self.run.committed_version,
            self.publish_driver.stage,
            self.members.num_generated_tokens,
            self.members.num_moves,
            None if snapshot is None else (tuple(snapshot.num_groups.items()), snapshot.num_opened),
            None if self.evaluator is None else (self.evaluator.version, self.evaluator.num_open),
        )

    async def refresh(self) -> None:
        """Read the figures of the ledger that only people look at. O(leases).

        While Redis is away or slow, the last figures stay, because the caller has a deadline.
        """
        try:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                self.dispatcher.snapshot = await self._ledger.snapshot()
                self._num_leases = Counter([row.member async for row in self._ledger.rows(GroupState.LEASED)])
        except (UnavailableError, TimeoutError) as error:
            logger.debug("status from memory: %s", error)

    async def status(self) -> MeshStatus:
        """Return the status of the mesh. If Redis does not answer, the ledger's figures are the last known figures."""
        await self.refresh()
        snapshot = self.dispatcher.snapshot
        return MeshStatus(
            run_id=self.run.run_id,
            run_state=self.run.state,
            failure=self.run.failure,
            step=self.run.step,
            num_steps=self._admission.num_steps,
            committed_version=self.run.committed_version,
            metrics=self.run.metrics,
            last_evaluation=None if self.evaluator is None else self.evaluator.last_result,
            num_groups={} if snapshot is None else {state.value: n for state, n in snapshot.num_groups.items()},
            num_slots=self._admission.num_slots,
            num_slots_used=0 if snapshot is None else snapshot.num_slots_used,
            generated_tokens_per_s=self._meter.tokens_per_s,
            num_generated_tokens=self.members.num_generated_tokens,
            members=tuple(self._member_status(member) for member in self.members.all),
            waiting_for=waiting_for(self.view()) if self.quiet_s >= QUIET_S else "",
        )

    def view(self) -> View:
        """Return the state from which `waiting_for` makes its sentence."""
        snapshot, learner = self.dispatcher.snapshot, self.members.learner
        return View(
            run_state=self.run.state,
            has_learner=learner is not None,
            learner_phase=None if learner is None else learner.report.phase,
            num_rollouts=len(self.members.rollouts),
            num_serving=sum(self.dispatcher.is_serving(member) for member in self.members.rollouts),
            publish_stage=self.publish_driver.stage,
            num_groups={} if snapshot is None else snapshot.num_groups,
            num_slots=self._admission.num_slots,
            num_slots_used=0 if snapshot is None else snapshot.num_slots_used,
            is_closed=snapshot is not None and snapshot.is_closed,
            num_credits=self.dispatcher.num_credits,
            num_evaluation_open=0 if self.evaluator is None else self.evaluator.num_open,
            holders=tuple(member.name for member in self.members.rollouts if self._leases_of(member)),
            memory_shortage=self.dispatcher.memory_shortage,
        )

    def shortfall(self, num_groups: Mapping[GroupState, int]) -> str:
        """See `Admission.shortfall`. The sentence is empty unless the run is FINISHED."""
        return self._admission.shortfall(num_groups) if self.run.state is RunState.FINISHED else ""

    def _member_status(self, member: Member) -> MemberStatus:
        is_generating = member.role is Role.ROLLOUT
        return MemberStatus(
            name=member.name,
            role=member.role,
            address=member.address,
            version=member.version,
            is_serving=self.dispatcher.is_serving(member) if is_generating else True,
            heartbeat_age_s=self.members.heartbeat_age_s(member),
            num_leases=self._leases_of(member),
        )

    def _leases_of(self, member: Member) -> int:
        num_evaluation = 0 if self.evaluator is None else len(self.evaluator.leases_of(member.name))
        return self._num_leases[member.name] + num_evaluation

    def _require_learner(self, name: str, incarnation: str) -> None:
        member = self.members.require(name, incarnation)
        if member.role is not Role.LEARNER:
            raise InvalidArgumentError(
                f"{name!r} is a {member.role.value} member; only the learner may do this", "name"
            )

    async def _lose(self, member: Member) -> None:
        """End the streams of a member that is gone, and give its leases to other members."""
        self._detach(member)
        if member.role is Role.LEARNER:
            self.publish_driver.lose_learner()
        if member.role is Role.ROLLOUT:
            self._to_revoke.add(member.name)
            await self._revoke(member.name)

    def _detach(self, member: Member) -> None:
        self.dispatcher.close_line_of(member.name)
        if self.evaluator is not None:
            self.evaluator.revoke(member.name)
        self._finish_if_done()
        self.dispatcher.wake()

    async def _revoke(self, name: str) -> None:
        """Revoke the leases of a member. While Redis is away, the watch tries again each second.

        If the revocation never succeeds, the leases end at their own deadline.
        """
        try:
            await self._ledger.revoke_member(name, is_excused=name in self._excused)
        except UnavailableError as error:
            logger.warning("the leases of %s cannot be revoked yet: %s", name, error, extra={"member": name})
            return
        self._to_revoke.discard(name)
        self._excused.discard(name)

    def _finish_if_done(self) -> None:
        if self.run.state is RunState.FINISHING and (self.evaluator is None or self.evaluator.is_idle):
            self.run.finish()
            self.dispatcher.close_all()


def _check_address(address: str) -> None:
    """Check that a member's address is an address.

    Raises:
        InvalidArgumentError: the text is no address.
    """
    try:
        parse_address(address)
    except ConfigError as error:
        raise InvalidArgumentError(str(error), "address") from error
