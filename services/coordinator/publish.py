"""The publish of a version: drives the rollout workers through the weight protocol.

::

    learner                      PublishDriver                           rollout workers
      BeginPublish ──────────────►  wait for the pinned evaluation, for workers
                                    PREPARE ─────────────────────────────► all at once; without the workers that
                                                                           fail, again for a smaller epoch
                                    RECEIVE ─────────────────────────────► (finish gathers the answers)
      ◄── weight epoch ─────────
      ══ broadcast ══════════════════════════════════════════════════════► (beside the coordinator)
      FinishPublish(digest) ─────►  gather RECEIVE, compare digests
                                    COMMIT or ABORT ─────────────────────► all at once
      ◄── outcome ──────────────

A transfer counts only if *all* prepared workers received exactly the bytes that the learner sent. Otherwise all workers
abort the version, and the old version goes on serving. After COMMIT a worker is in one of three states:

* The worker answered that it loaded the version: the worker serves the version.
* The worker answered that its load failed midway (`TaintedError`), now or at a later PREPARE: the worker is dropped.
* The worker gave no answer until the deadline, or an unexpected answer. It holds one of the two versions, and the
  coordinator cannot know which: the worker gets no leases until it has loaded a later version.

Begin and finish run as tasks. A caller that gives up and calls again therefore joins the task under way.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from rollmesh.errors import (
    RollMeshError,
    SupersededError,
    TaintedError,
    UnavailableError,
)
from rollmesh.rpc.rollout_client import RolloutClient
from rollmesh.types import (
    Announcement,
    CommitReport,
    PolicyVersion,
    PublishOutcome,
    ReceiveReport,
    WeightEpoch,
    WeightPlan,
)
from rollmesh.wire.weights import EncodedPlan, encode_plan
from services.coordinator.attempt import Attempt, names_of, no_worker_ready, transfer_problem
from services.coordinator.members import Clock, Member, Members
from services.coordinator.rollout_clients import Party, RolloutClients, call_all
from services.coordinator.versions import VersionBook

logger = logging.getLogger(__name__)
T = TypeVar("T")

ABORT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class PublishSettings:
    """Deadlines of the protocol's steps, and how many workers the first publish waits for.

    Attributes:
        num_workers: workers for which the first publish waits, until ``start_timeout_s`` after the coordinator's start.
            Then the publish goes on with the workers that are there, if any.
        start_timeout_s: seconds; later publishes wait this long for a worker.
        prepare_timeout_s: seconds that a worker has to answer PREPARE.
        commit_timeout_s: seconds that a worker has to answer COMMIT.
    """

    num_workers: int
    start_timeout_s: float
    prepare_timeout_s: float
    commit_timeout_s: float


class PublishDriver:
    """Publishes one version at a time.

    Args:
        members: the members of the run.
        versions: the versions of the run. Only the publish driver changes them.
        settings: deadlines.
        connect: returns a client for a worker's address.
        until_unpinned: waits for an evaluation that holds the next version back.
        before_commit: called with a version and the step that made it, before the first worker loads the version. An
            UnavailableError aborts the version.
        on_commit: called with a version and the step that made it when the version serves, before the learner is told.
        on_tainted: drops a member whose load failed midway; called with the member and the reason.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        members: Members,
        versions: VersionBook,
        settings: PublishSettings,
        connect: Callable[[str], RolloutClient],
        until_unpinned: Callable[[], Awaitable[None]],
        before_commit: Callable[[PolicyVersion, int], Awaitable[None]],
        on_commit: Callable[[PolicyVersion, int], None],
        on_tainted: Callable[[Member, str], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._members = members
        self._versions = versions
        self._settings = settings
        self._until_unpinned = until_unpinned
        self._before_commit = before_commit
        self._on_commit = on_commit
        self._on_tainted = on_tainted
        self._clock = clock
        self._started_s = clock()
        self._clients = RolloutClients(connect)
        self._attempt: Attempt | None = None
        self._plan: EncodedPlan | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beginning = asyncio.Lock()

    def restore(self, version: PolicyVersion) -> None:
        """Take ``version`` for the committed version, because an earlier coordinator recorded the version."""
        self._versions.committed = version

    @property
    def stage(self) -> str:
        """A clause that says for what the publish under way waits; empty if there is no publish."""
        return "" if self._attempt is None else self._attempt.waits_for

    async def begin(self, announcement: Announcement, learner: str) -> WeightEpoch:
        """Announce and prepare a version. On return, all workers of the epoch are receiving.

        A repeated call joins the first call. After the end of the publish, or after a failure, a call begins the
        version anew. If the version is the committed version, only the workers that lack the version take part.

        Args:
            announcement: the version to publish.
            learner: the incarnation of the learner.

        Raises:
            SupersededError: the version is older than the committed version, or every worker serves the version.
            UnavailableError: there is no worker, or no worker got ready.
            WeightTransferError: a worker refused the plan.
        """
        async with self._beginning:
            attempt = await self._announce(announcement, learner)
        assert attempt.begin is not None
        return await asyncio.shield(attempt.begin)

    async def _announce(self, announcement: Announcement, learner: str) -> Attempt:
        """Return the attempt under way for this version, or a new attempt."""
        attempt, version = self._attempt, announcement.version
        if attempt is not None and self._is_under_way(attempt):
            if (attempt.version, attempt.learner) == (version, learner):
                return attempt
            self._versions.check_new(version)
            await self._give_up(attempt, f"the learner went on to version {version}")
        self._versions.check_new(version)
        self._versions.outcomes.pop(version, None)
        attempt = self._attempt = Attempt(announcement, learner)
        attempt.begin = self._spawn(self._begin(attempt), f"begin {version}")
        return attempt

    async def give_up_others(self, learner: str) -> None:
        """Give up the publish of another learner than ``learner``. A publish that is finishing ends by itself first.

        Args:
            learner: the incarnation of the learner that goes on; empty where no learner is left.
        """
        async with self._beginning:
            attempt = self._attempt
            if attempt is not None and attempt.learner != learner and self._is_under_way(attempt):
                await self._give_up(attempt, "its learner is gone")

    def lose_learner(self) -> None:
        """Give up the publish under way in the background: its learner is gone."""
        self._spawn(self.give_up_others(""), "give up the publish")

    @property
    def is_idle(self) -> bool:
        """Whether no publish is under way."""
        return self._attempt is None or not self._is_under_way(self._attempt)

    def _is_under_way(self, attempt: Attempt) -> bool:
        return attempt.version not in self._versions.outcomes and not attempt.has_failed_to_begin

    async def finish(self, version: PolicyVersion, digest: bytes, failure: str = "") -> PublishOutcome:
        """Verify and commit a version, or abort it. A repeated call gets the first answer.

        Raises:
            SupersededError: the version is not being published.
        """
        if (outcome := self._versions.outcomes.get(version)) is not None:
            return outcome
        attempt = self._attempt
        is_begun = attempt is not None and attempt.begin is not None and attempt.begin.done()
        if attempt is None or attempt.version != version or not is_begun or attempt.has_failed_to_begin:
            raise SupersededError(f"version {version} is not being published; begin it first")
        if attempt.finish is None:
            attempt.finish = self._spawn(self._finish(attempt, digest, failure), f"finish {version}")
        return await asyncio.shield(attempt.finish)

    async def close(self) -> None:
        """Cancel the tasks under way, and close the workers' clients."""
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._clients.close()

    async def _begin(self, attempt: Attempt) -> WeightEpoch:
        await self._wait_for_evaluation(attempt)
        await self._wait_for_workers(attempt)
        refusals: dict[str, RollMeshError] = {}
        while True:
            members = [member for member in self._candidates(attempt) if member.name not in refusals]
            if not members:
                raise no_worker_ready(attempt.version, refusals)
            if self._is_again(attempt) and not refusals:
                for member in members:
                    member.num_tries += 1
            epoch = await self._prepare(attempt, members, refusals)
            if epoch is not None:
                break
        timeout_s = self._settings.prepare_timeout_s + attempt.announcement.transfer_deadline_s
        attempt.pending = {party.member.name for party in attempt.parties}
        for party in attempt.parties:
            name = party.member.name
            receive = party.receive(attempt.version, timeout_s)
            task = self._spawn(receive, f"{name} receives {attempt.version}")
            task.add_done_callback(functools.partial(_answered, attempt.pending, name))
            attempt.receives[name] = task
        attempt.stage = f"to receive version {attempt.version} from the learner"
        logger.info("sending version %s to %s", attempt.version, names_of(attempt.pending))
        return epoch

    def _candidates(self, attempt: Attempt) -> list[Member]:
        """Return the workers that take part in the attempt. A worker that serves the version already does not."""
        version = attempt.version if self._is_again(attempt) else None
        return [m for m in self._members.rollouts if m.can_prepare and (version is None or m.version != version)]

    def _is_again(self, attempt: Attempt) -> bool:
        """Return whether the attempt publishes the committed version once more."""
        return attempt.version == self._versions.committed

    async def _wait_for_evaluation(self, attempt: Attempt) -> None:
        """Wait for an evaluation that is pinned to the serving version, as long as a worker serves that version."""
        attempt.stage = "the evaluation of the serving version"
        if self._is_again(attempt):
            return
        unpinned = asyncio.ensure_future(self._until_unpinned())
        try:
            while not unpinned.done() and any(self._serves(member) for member in self._members.rollouts):
                self._members.changed.clear()
                changed = asyncio.ensure_future(self._members.changed.wait())
                await asyncio.wait({unpinned, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            if unpinned.done():
                unpinned.result()
        finally:
            unpinned.cancel()

    def _serves(self, member: Member) -> bool:
        return member.version is not None and member.version == self._versions.committed

    async def _wait_for_workers(self, attempt: Attempt) -> None:
        """Wait for workers: the first publish waits for all configured workers, later publishes for any worker.

        Raises:
            SupersededError: the version is the committed version, and every worker serves the version.
            UnavailableError: no worker registered in time.
        """
        rollouts = self._members.rollouts
        if self._is_again(attempt) and rollouts and not self._candidates(attempt):
            raise SupersededError(f"version {attempt.version} serves already")
        is_first = self._versions.committed is None
        started_s = self._started_s if is_first else self._clock()
        num_wanted = self._settings.num_workers if is_first else 1
        while True:
            self._members.changed.clear()
            num_ready = len(self._candidates(attempt))
            if num_ready >= num_wanted:
                return
            attempt.stage = f"{num_wanted} rollout worker(s) to register, of which {num_ready} did"
            try:
                async with asyncio.timeout(max(0.0, started_s + self._settings.start_timeout_s - self._clock())):
                    await self._members.changed.wait()
            except TimeoutError:
                if num_ready:
                    logger.warning("going on with %d of %d rollout workers", num_ready, num_wanted)
                    return
                raise UnavailableError(
                    f"no rollout worker registered within {self._settings.start_timeout_s:g} s; start one"
                ) from None

    async def _prepare(
        self, attempt: Attempt, members: list[Member], refusals: dict[str, RollMeshError]
    ) -> WeightEpoch | None:
        """Prepare the members for a version, and return their weight epoch.

        Returns None if a worker failed, and adds the failed workers to ``refusals``. Then the other workers have to be
        prepared again, because ranks and world size depend on the workers of the epoch.
        """
        announced, timeout_s = attempt.announcement, self._settings.prepare_timeout_s
        plan = await self._encoded(announced.plan)
        epoch_members = tuple((m.name, m.incarnation, m.num_weight_ranks) for m in members)
        epoch = self._versions.epoch_for(epoch_members, announced.store_host, announced.store_port)
        attempt.parties = []
        rank = 1
        for member in members:
            is_member = functools.partial(self._is_member, member)
            attempt.parties.append(Party(member, await self._clients.of(member), rank, is_member))
            rank += member.num_weight_ranks
        attempt.stage = f"to prepare for version {announced.version}"
        answers = await call_all(
            {party.member.name: party.prepare(announced, plan, epoch, timeout_s) for party in attempt.parties},
            attempt.pending,
        )
        failed = {name: answer for name, answer in answers.items() if isinstance(answer, RollMeshError)}
        if not failed:
            return epoch
        for party in attempt.parties:
            name = party.member.name
            if (error := failed.get(name)) is None:
                continue
            logger.warning("left %s out of weight epoch %d: %s", name, epoch.number, error, extra={"member": name})
            party.member.missed_prepare_s = self._clock()
            if isinstance(error, TaintedError):
                await self._on_tainted(party.member, str(error))
        refusals.update(failed)
        self._versions.break_epoch()
        await self._abort(attempt, "prepared anew without " + ", ".join(failed))
        return None

    async def _finish(self, attempt: Attempt, digest: bytes, failure: str) -> PublishOutcome:
        if failure:
            return await self._end_aborted(attempt, f"the learner could not send: {failure}")
        await asyncio.wait(attempt.receives.values())
        problems = [
            problem
            for party in attempt.parties
            if (problem := transfer_problem(party.member, attempt.receives[party.member.name], digest))
        ]
        if problems:
            return await self._end_aborted(attempt, "; ".join(problems))
        try:
            await self._before_commit(attempt.version, attempt.announcement.step)
        except UnavailableError as error:
            return await self._end_aborted(attempt, f"the version could not be recorded: {error}")
        return await self._commit(attempt)

    async def _commit(self, attempt: Attempt) -> PublishOutcome:
        version, timeout_s = attempt.version, self._settings.commit_timeout_s
        attempt.stage = f"to load version {version}"
        calls = {party.member.name: self._load(party, version, timeout_s) for party in attempt.parties}
        answers = await call_all(calls, attempt.pending)
        serving: dict[str, float] = {}
        for party in attempt.parties:
            answer = answers[party.member.name]
            if isinstance(answer, RollMeshError):
                party.member.version = None
            else:
                party.member.version, party.member.num_tries = version, 0
                serving[party.member.name] = answer.pause_s
        if not serving:
            self._versions.break_epoch()
            reason = "no worker is known to serve the version: " + "; ".join(
                f"{name}: {e}" for name, e in answers.items()
            )
            return self._close(attempt, PublishOutcome(False, reason, (), 0.0))
        outcome = self._close(attempt, PublishOutcome(True, "", tuple(serving), max(serving.values())))
        self._on_commit(version, attempt.announcement.step)
        return outcome

    async def _load(self, party: Party, version: PolicyVersion, timeout_s: float) -> CommitReport:
        """Commit the version on one worker. Drop a tainted worker at once, because it leaves by itself soon."""
        member = party.member
        try:
            return await party.commit(version, timeout_s)
        except TaintedError as error:
            await self._on_tainted(member, f"it could not load version {version} ({error})")
            raise
        except RollMeshError as error:
            logger.warning(
                "left %s out of version %s: it is not known whether the worker loaded the version (%s)",
                member.name,
                version,
                error,
                extra={"member": member.name},
            )
            raise

    async def _end_aborted(self, attempt: Attempt, reason: str) -> PublishOutcome:
        logger.warning("aborted version %s: %s", attempt.version, reason)
        self._versions.break_epoch()
        await self._abort(attempt, reason)
        return self._close(attempt, PublishOutcome(False, reason, (), 0.0))

    def _close(self, attempt: Attempt, outcome: PublishOutcome) -> PublishOutcome:
        self._versions.close(attempt.version, outcome)
        attempt.stage = ""
        return outcome

    async def _give_up(self, attempt: Attempt, reason: str) -> None:
        """Close an attempt that the learner left. An attempt that is finishing may commit, and ends by itself."""
        if attempt.finish is not None:
            await asyncio.wait({attempt.finish})
        elif attempt.begin is not None:
            attempt.begin.cancel()
            await asyncio.wait({attempt.begin})
        if attempt.version not in self._versions.outcomes:
            await self._end_aborted(attempt, reason)

    async def _abort(self, attempt: Attempt, reason: str) -> None:
        receives = [task for task in attempt.receives.values() if not task.done()]
        calls = {party.member.name: party.abort(attempt.version, reason, ABORT_TIMEOUT_S) for party in attempt.parties}
        answers = await call_all(calls, attempt.pending)
        for task in receives:
            task.cancel()
        await asyncio.gather(*receives, return_exceptions=True)
        for name, answer in answers.items():
            if isinstance(answer, RollMeshError):
                logger.warning("%s did not answer ABORT of version %s: %s", name, attempt.version, answer)

    async def _encoded(self, plan: WeightPlan) -> EncodedPlan:
        """Return the encoded plan, which is usually the same for all versions.

        A thread encodes the plan: the 46,000 tensors of a mixture take a third of a second, which would block the event
        loop.
        """
        if self._plan is None or self._plan.digest != plan.digest:
            self._plan = await asyncio.to_thread(encode_plan, plan)
        return self._plan

    def _is_member(self, member: Member) -> bool:
        return self._members.get(member.name) is member

    def _spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task that `close` ends. Its error goes to its awaiter, and is dropped if no awaiter is left."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return task


def _answered(pending: set[str], name: str, _: asyncio.Task[ReceiveReport]) -> None:
    pending.discard(name)
