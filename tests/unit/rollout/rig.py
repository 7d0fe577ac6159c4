"""The inner classes of a worker, with a fake engine and a real ledger as coordinator. gRPC and Redis are real."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from rollmesh.algorithms.config import FilterSection
from rollmesh.config import DataSection
from rollmesh.data.render import PromptRenderer
from rollmesh.errors import SupersededError
from rollmesh.replay.connection import connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.rpc.scorer_clients import RewardClient
from rollmesh.types import EvaluationSample, GroupState, Lease, LeaseKind, PromptId, SamplingSpec
from services.rollout.delivery import Delivery
from services.rollout.group import GenerationCounts, GroupRunner
from services.rollout.lease_keeper import LeaseKeeper
from services.rollout.pool import GroupPool
from services.rollout.scoring import Scorer
from tests.fakes.engine import FakeEngine
from tests.fakes.scorers import FakeRewardServicer, reward_server


class AsciiTokenizer:
    """Makes one token out of each character."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(chr(token) for token in token_ids)

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise AssertionError("no chat template here")


def lease(
    index: int = 0, *, kind: LeaseKind = LeaseKind.TRAIN, token: int = 1, num_samples: int = 2, **changes: Any
) -> Lease:
    dataset = "train" if kind is LeaseKind.TRAIN else "eval"
    prompt_id = PromptId(dataset, 0, index)
    fields: dict[str, Any] = {
        "group_id": str(prompt_id),
        "fencing_token": token,
        "kind": kind,
        "prompt_id": prompt_id,
        "sequence": index,
        "attempt": 0,
        "num_samples": num_samples,
        "prompt_json": f'"prompt {index}"',
        "label_json": '"label"',
        "datasource": "numbers",
        "sampling": SamplingSpec(1.0, 1.0, 0, 16),
        "ttl_s": 30.0,
    }
    return Lease(**{**fields, **changes})


class LedgerLeases:
    """A lease stream that leases from the ledger as far as credits go. Leases that a test puts in come first."""

    def __init__(self, ledger: CoordinatorLedger, **changes: Any) -> None:
        self._ledger = ledger
        self._changes = changes
        self._by_hand: deque[Lease] = deque()
        self._news = asyncio.Event()
        self._is_closed = False
        self.credits = 0
        self.leased: list[str] = []

    def grant(self, num_leases: int) -> None:
        self.credits += num_leases
        self._news.set()

    def put(self, lease: Lease) -> None:
        self._by_hand.append(lease)
        self._news.set()

    def wake(self) -> None:
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Lease:
        while not self._is_closed:
            self._news.clear()
            next_lease = await self._next()
            # The Redis client may lose a cancellation that comes together with its reply.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            if next_lease is not None:
                self.credits -= 1
                self.leased.append(next_lease.group_id)
                return next_lease
            await self._news.wait()
        raise StopAsyncIteration

    async def _next(self) -> Lease | None:
        if self.credits < 1:
            return None
        if self._by_hand:
            return self._by_hand.popleft()
        for row in await self._ledger.lease("rollout-0", 30.0, 1):
            return lease(
                row.prompt_id.index,
                token=row.fencing_token,
                sequence=row.sequence,
                attempt=row.attempt,
                **self._changes,
            )
        return None

    async def close(self) -> None:
        self._is_closed = True
        self._news.set()


class Evaluations:
    """Keeps the reported results. A fencing token other than 1 belongs to a lease that is over."""

    def __init__(self) -> None:
        self.reported: dict[str, tuple[Sequence[EvaluationSample], str]] = {}

    async def report_evaluation(
        self, group_id: str, fencing_token: int, samples: Sequence[EvaluationSample], failure: str = ""
    ) -> None:
        if fencing_token != 1:
            raise SupersededError(f"lease of {group_id} is over")
        self.reported[group_id] = (samples, failure)


class Rig:
    """All objects that a test reads or changes."""

    def __init__(
        self,
        engine: FakeEngine,
        reward: FakeRewardServicer,
        ledger: CoordinatorLedger,
        max_open_groups: int,
        filter_section: FilterSection,
    ) -> None:
        self.engine = engine
        self.reward = reward
        self.ledger = ledger
        self.counts = GenerationCounts()
        self.evaluations = Evaluations()
        self.delivery = Delivery(ledger, self.evaluations, 30.0, filter_section)
        self.max_open_groups = max_open_groups
        self.settings: dict[str, Any] = {}
        self.running: asyncio.Task[None]
        self.pool: GroupPool
        self.keeper: LeaseKeeper
        self.leases: LedgerLeases

    def start(self, client: RewardClient, **changes: Any) -> None:
        scorer = Scorer(client, None, attempts=2, timeout_s=5.0)
        data = DataSection(path=Path("x"), **self.settings)
        renderers = {kind: PromptRenderer(AsciiTokenizer(), data, 20) for kind in LeaseKind}
        runner = GroupRunner(self.engine, scorer, renderers, AsciiTokenizer(), has_reference=False, counts=self.counts)
        self.keeper = LeaseKeeper(30.0, 60.0, asyncio.get_running_loop().time)
        self.pool = GroupPool(runner, self.delivery, self.keeper, self.counts, self.max_open_groups)
        self.leases = LedgerLeases(self.ledger, **changes)
        self.running = asyncio.create_task(self.pool.run(self.leases))

    async def open(self, *indices: int) -> None:
        await self.ledger.open_groups([PromptId("train", 0, index) for index in indices])
        self.leases.wake()

    async def state(self, index: int) -> GroupState:
        row = await self.ledger.row(f"train:0:{index}")
        assert row is not None
        return row.state

    async def reason(self, index: int) -> str:
        row = await self.ledger.row(f"train:0:{index}")
        assert row is not None
        return row.reason

    async def until(self, state: GroupState, count: int, timeout_s: float = 30.0) -> None:
        """Wait until ``count`` groups are in ``state``."""
        async with asyncio.timeout(timeout_s):
            while True:
                if (await self.ledger.snapshot()).num_groups[state] >= count:
                    return
                await asyncio.sleep(0.01)

    async def close(self, grace_s: float = 0.0) -> None:
        await self.pool.close(self.running, self.leases, grace_s, "the worker was told to stop")


@asynccontextmanager
async def running_rig(
    url: str,
    run_id: str,
    engine: FakeEngine | None = None,
    reward: FakeRewardServicer | None = None,
    *,
    max_open_groups: int = 4,
    max_attempts: int = 2,
    settings: dict[str, Any] | None = None,
    filter_section: FilterSection | None = None,
    **changes: Any,
) -> AsyncIterator[Rig]:
    """Run a pool. ``settings`` change the data section; ``changes`` change every lease."""
    redis = connect(url, 5.0)
    rig = Rig(
        engine or FakeEngine(),
        reward or FakeRewardServicer(),
        CoordinatorLedger(redis, run_id, max_attempts=max_attempts, term=0),
        max_open_groups,
        filter_section or FilterSection(),
    )
    rig.settings = settings or {}
    async with reward_server(rig.reward) as server:
        client = RewardClient(server.address)
        await client.connect(5.0)
        rig.start(client, **changes)
        try:
            yield rig
        finally:
            await rig.close()
            await client.close()
            await redis.aclose()
