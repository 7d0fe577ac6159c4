"""Leases against credits: which worker may work on which group now.

::

    ledger (train) ──┐                              ┌── LeaseLine "rollout-0"  credits 3 ──► stream to the worker
    evaluator ───────┴── Dispatcher.dispatch ───────┴── LeaseLine "rollout-1"  credits 0
                         release slots → open groups → lease to eligible lines with credits

One task runs `Dispatcher.run`. The task waits for wake-ups (credits, commits, results), and looks at the ledger at
least every `POLL_S` seconds, because workers change the ledger without telling the coordinator. One pass costs a few
round trips to Redis, whatever the number of groups and members.

Evaluation goes before training. Only members that serve a recent enough version get leases.

If a stream breaks, leases on their way still belong to the member, and the coordinator cannot tell which leases the
member received. Therefore a new stream begins with all leases that the member holds by ledger and round, each with its
remaining time; the worker drops the leases that it has already. The same happens after an answer of the ledger to a
lease request was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from rollmesh.errors import ConfigError, UnavailableError
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.ledger import LedgerSnapshot
from rollmesh.replay.rows import GroupRow
from rollmesh.types import GroupState, Lease, RunState
from services.coordinator.admission import Admission
from services.coordinator.evaluation import EvaluationItem, Evaluator
from services.coordinator.members import Member, Members
from services.coordinator.prompts import PromptBook
from services.coordinator.run import Run

logger = logging.getLogger(__name__)

POLL_S = 0.1
RETRY_S = 1.0


@dataclass(eq=False)
class LeaseLine:
    """One open lease stream of one member. The dispatcher fills the line, and the stream's handler empties it.

    Attributes:
        credits: number of leases that the worker takes now.
        is_open: whether the stream goes on.
        is_unsure: whether the member may hold leases that never reached the worker. The member gets no new leases
            until these leases were sent again.
    """

    member: Member
    credits: int = 0
    is_open: bool = True
    is_unsure: bool = True
    _leases: asyncio.Queue[Lease | None] = field(default_factory=asyncio.Queue)
    _repeated: set[tuple[str, int]] = field(default_factory=set)

    def send(self, lease: Lease) -> None:
        """Send a lease, for one credit."""
        self.credits -= 1
        self._leases.put_nowait(lease)

    def suspect_lost_leases(self) -> None:
        """Note that the member may hold leases of which this line does not know: the ledger's answer was lost."""
        self.is_unsure = True
        self._repeated.clear()

    def repeat(self, held: list[Lease]) -> None:
        """Send all leases that the member holds again, as far as its credits go.

        The credits suffice: the worker still has a credit for each lease that it never received, and grants one more
        credit for each lease that it receives for the second time.
        """
        missing = [lease for lease in held if (lease.group_id, lease.fencing_token) not in self._repeated]
        self.is_unsure = len(missing) > self.credits
        for lease in missing[: self.credits]:
            self._repeated.add((lease.group_id, lease.fencing_token))
            self.send(lease)

    def close(self) -> None:
        """End the stream once the handler has read all leases."""
        if self.is_open:
            self.is_open = False
            self._leases.put_nowait(None)

    async def next(self) -> Lease | None:
        """Return the next lease, or None at the end of the line. Waits for the dispatcher or for `close`."""
        return await self._leases.get()


class Dispatcher:
    """Moves work from the ledger and the evaluation round to the lines.

    Args:
        ledger: the run's ledger.
        members: the members of the run.
        run: has the state of the run and the version that serves.
        prompts: turns rows into leases.
        admission: the bounds of the run.
        evaluator: None where the run has no evaluation.
        lease_ttl_s: seconds that a lease lives.
        max_version_lag: versions that a member may be behind and still get training leases.
    """

    def __init__(
        self,
        ledger: CoordinatorLedger,
        members: Members,
        run: Run,
        prompts: PromptBook,
        admission: Admission,
        evaluator: Evaluator | None,
        lease_ttl_s: float,
        max_version_lag: int,
    ) -> None:
        self._ledger = ledger
        self._members = members
        self._run = run
        self._prompts = prompts
        self._admission = admission
        self._evaluator = evaluator
        self._lease_ttl_s = lease_ttl_s
        self._max_version_lag = max_version_lag
        self._lines: dict[str, LeaseLine] = {}
        self._unsent: list[Lease] = []
        self._is_release_due = False
        self._wake = asyncio.Event()
        self.snapshot: LedgerSnapshot | None = None
        self.memory_shortage = ""

    def wake(self) -> None:
        """Make the dispatcher look again, because a change may allow a lease."""
        self._wake.set()

    def on_commit(self) -> None:
        """Free the slots of the groups whose version serves now, at the next look."""
        self._is_release_due = True
        self.wake()

    def open_line(self, member: Member) -> LeaseLine:
        """Begin a worker's lease stream. An earlier stream of the same name ends."""
        self.close_line_of(member.name)
        line = self._lines[member.name] = LeaseLine(member)
        return line

    def grant(self, line: LeaseLine, credits: int) -> None:
        """Record that the worker takes ``credits`` more leases on this stream."""
        line.credits += credits
        self.wake()

    def close_line(self, line: LeaseLine) -> None:
        """End a line whose stream is over. The member keeps the leases that were sent on it."""
        if self._lines.get(line.member.name) is line:
            del self._lines[line.member.name]
        line.close()
        self.wake()

    def close_line_of(self, name: str) -> None:
        """End a member's stream from the coordinator's side."""
        if (line := self._lines.get(name)) is not None:
            self.close_line(line)

    def close_all(self) -> None:
        """End the streams of all members."""
        for name in list(self._lines):
            self.close_line_of(name)

    @property
    def num_lines(self) -> int:
        """Number of open lease streams."""
        return len(self._lines)

    @property
    def num_credits(self) -> int:
        """Number of leases that workers which may train take now."""
        return sum(line.credits for line in self._lines.values() if self._may_train(line))

    async def run(self) -> None:
        """Dispatch until cancelled. While Redis cannot be reached, no group moves and no group is lost."""
        is_reachable, pause_s = True, POLL_S
        while True:
            self._wake.clear()
            try:
                await self.dispatch()
                pause_s, is_reachable = POLL_S, True
            except UnavailableError as error:
                if is_reachable:
                    logger.warning("no group is opened or leased until Redis answers: %s", error)
                pause_s, is_reachable = RETRY_S, False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def dispatch(self) -> None:
        """Make one pass: give leases back, free slots, open groups, send leases again, lease.

        Raises:
            UnavailableError: Redis cannot be reached; the pass may be repeated.
        """
        await self._return_unsent()
        await self._release()
        if self._run.state is RunState.RUNNING:
            await self._admit()
        else:
            self.snapshot = await self._ledger.snapshot()
        if not self._run.state.is_over:
            await self._repeat_held()
            self._lease_evaluation()
        if self._run.state is RunState.RUNNING:
            await self._lease_training()

    async def _return_unsent(self) -> None:
        """Give back the leases whose line closed before they were sent. The groups are excused and do not fail."""
        while self._unsent:
            lease = self._unsent[-1]
            reason = "the lease did not reach its worker"
            await self._ledger.give_back(lease.group_id, lease.fencing_token, reason, is_excused=True)
            self._unsent.pop()

    async def _release(self) -> None:
        """Free the slots of the groups whose version serves now."""
        if self._is_release_due:
            step = self._run.committed_step
            await self._ledger.release_slots(step)
            self._is_release_due = step != self._run.committed_step

    async def _admit(self) -> None:
        """Open groups while slots are free. Close the ledger once no further group will be opened."""
        snapshot = await self._ledger.snapshot()
        count = self._admission.num_to_open(snapshot.num_groups, snapshot.num_opened, snapshot.num_slots_used)
        if count and not snapshot.is_closed and await self._has_memory():
            prompts = self._prompts.next_prompts(snapshot.num_opened, count)
            await self._ledger.open_groups(prompts, self._admission.num_slots, snapshot.num_opened)
            snapshot = await self._ledger.snapshot()
        if not snapshot.is_closed and self._admission.is_complete(snapshot.num_groups, snapshot.num_opened):
            await self._ledger.close()
        self.snapshot = snapshot

    async def _has_memory(self) -> bool:
        """Return whether Redis has room for more groups. Log when the answer changes."""
        memory = await self._ledger.memory()
        if memory.is_short != bool(self.memory_shortage):
            logger.warning("Redis uses %s: groups are %s", memory, "held back" if memory.is_short else "opened again")
        self.memory_shortage = str(memory) if memory.is_short else ""
        return not memory.is_short

    async def _repeat_held(self) -> None:
        """Send the leases again that may be lost. Costs O(leases) at the beginning of a stream."""
        lines = [line for line in self._lines.values() if line.is_unsure and line.credits > 0]
        if not lines:
            return
        names = {line.member.name for line in lines}
        rows = [row async for row in self._ledger.rows(GroupState.LEASED) if row.member in names]
        left_s = await self._ledger.seconds_left([row.group_id for row in rows])
        held: dict[str, list[Lease]] = {name: self._held_evaluations(name) for name in names}
        for row in rows:
            if (ttl_s := left_s.get(row.group_id, 0.0)) > 0:
                held[row.member].extend(await self._train_lease(row, ttl_s))
        for line in lines:
            if line.is_open:
                line.repeat(held[line.member.name])

    def _held_evaluations(self, name: str) -> list[Lease]:
        evaluator = self._evaluator
        if evaluator is None:
            return []
        items = [(item, evaluator.seconds_left(item)) for item in evaluator.leases_of(name)]
        return [
            lease
            for item, left_s in items
            if left_s > 0
            for lease in self._evaluation_lease(evaluator, item, item.fencing_token, left_s)
        ]

    def _lease_evaluation(self) -> None:
        evaluator = self._evaluator
        if evaluator is None:
            return
        for line, share in self._shares(self._may_evaluate, evaluator.num_waiting):
            for item, token in evaluator.take(line.member.name, share):
                for lease in self._evaluation_lease(evaluator, item, token, self._lease_ttl_s):
                    item.datasource = lease.datasource
                    line.send(lease)

    async def _lease_training(self) -> None:
        assert self.snapshot is not None
        num_waiting = self.snapshot.num_groups.get(GroupState.PENDING, 0)
        for line, share in self._shares(self._may_train, num_waiting):
            try:
                rows = await self._ledger.lease(line.member.name, self._lease_ttl_s, share, self._admission.num_slots)
                leases = [lease for row in rows for lease in await self._train_lease(row, self._lease_ttl_s)]
            except UnavailableError:
                line.suspect_lost_leases()
                raise
            for lease in leases:
                if line.is_open:
                    line.send(lease)
                else:
                    self._unsent.append(lease)

    async def _train_lease(self, row: GroupRow, ttl_s: float) -> list[Lease]:
        """Return the lease of a group, or no lease if the dataset's row cannot be used: then the group is FAILED.

        Too many such groups end the run, as all failures do (`admission.failed_too_often`).
        """
        try:
            return [self._prompts.train_lease(row, ttl_s)]
        except ConfigError as error:
            logger.warning("a row of the dataset cannot be used: %s", error, extra={"group": row.group_id})
            await self._ledger.give_back(row.group_id, row.fencing_token, str(error), is_final=True)
            return []

    def _evaluation_lease(self, evaluator: Evaluator, item: EvaluationItem, token: int, ttl_s: float) -> list[Lease]:
        """Return the lease of a held-out prompt, or no lease if its row cannot be used: then the prompt has failed."""
        try:
            return [self._prompts.evaluation_lease(item.prompt_id, token, item.attempt, ttl_s)]
        except ConfigError as error:
            evaluator.fail(item, str(error))
            return []

    def _shares(self, may_take: Callable[[LeaseLine], bool], num_waiting: int) -> list[tuple[LeaseLine, int]]:
        """Return how many of ``num_waiting`` groups each line gets.

        Each line gets an equal share, as far as its credits go; lines with more credits get the rest. Of 10 groups,
        lines with 2, 9 and 9 credits get 2, 4 and 4.
        """
        lines = sorted((line for line in self._lines.values() if may_take(line)), key=lambda line: line.credits)
        shares = []
        for index, line in enumerate(lines):
            share = min(line.credits, -(-num_waiting // (len(lines) - index)))
            num_waiting -= share
            if share:
                shares.append((line, share))
        return shares

    def is_serving(self, member: Member) -> bool:
        """Return whether the member's version is recent enough for training leases."""
        committed, version = self._run.committed_version, member.version
        if committed is None or version is None:
            return False
        return version.number >= committed.number - self._max_version_lag

    def _may_train(self, line: LeaseLine) -> bool:
        return line.credits > 0 and line.is_open and not line.is_unsure and self.is_serving(line.member)

    def _may_evaluate(self, line: LeaseLine) -> bool:
        assert self._evaluator is not None
        wanted, version = self._evaluator.version, line.member.version
        if line.credits < 1 or not line.is_open or line.is_unsure or wanted is None or version is None:
            return False
        return version >= wanted
