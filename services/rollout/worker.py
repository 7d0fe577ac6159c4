"""Runs one rollout worker from its registration to the end of its last group.

::

    coordinator ──weight protocol──► servicer ──► weights ──────► engine
                ──leases───────────► pool ──► runner ──generate──┘
                                      │         └──► scorer ──► reward, reference
                ◄──evaluations──── delivery ──► ledger (Redis)

The worker works until somebody tells it to stop, the run is over, or a failure is final. Then the worker, in this
order, grants no more credits, finishes the open groups or hands them back, closes the scorers' streams, leaves the run
(with the failure if there was one), stops serving, and closes its connections. The caller owns the engine and stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rollmesh.aio.awake import AwakeClock
from rollmesh.aio.supervisor import Supervisor
from rollmesh.algorithms.config import FilterSection
from rollmesh.data.render import PromptRenderer, Tokenizer
from rollmesh.errors import StartAgainError, TaintedError
from rollmesh.replay.connection import connect
from rollmesh.replay.ledger import Ledger
from rollmesh.rpc.channel import parse_address
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.lease_stream import LeaseStream
from rollmesh.rpc.membership import Membership
from rollmesh.rpc.scorer_clients import ReferenceClient, RewardClient
from rollmesh.rpc.server import Server
from rollmesh.types import LeaseKind, MemberReport, Role, RolloutStatus, RunState
from services.rollout.config import RolloutSection
from services.rollout.delivery import Delivery
from services.rollout.engine import Engine
from services.rollout.engine_watch import STALL_MARGIN_S, EngineWatch
from services.rollout.group import GenerationCounts, GroupRunner
from services.rollout.lease_keeper import LeaseKeeper
from services.rollout.pool import GroupPool
from services.rollout.scoring import Scorer
from services.rollout.servicer import RolloutServicer
from services.rollout.weight_protocol import WeightProtocol

_logger = logging.getLogger(__name__)

_STOP_GRACE_S = 3.0
"""Time that open groups get to end when somebody stops the worker while the run goes on."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings that a worker uses.

    Attributes:
        run_id: the run's name.
        rollout: the worker's own section.
        samples_per_prompt: the number of samples in a training group.
        filter: the rules that say which groups are not trained on.
        redis_url: the address of the run's Redis.
        redis_timeout_s: time that one command of Redis may take.
        payload_limit_bytes: the most bytes of one group in Redis.
        max_attempts: tries that a group has before the group fails.
        lease_ttl_s: the life of a lease, counted from its renewal.
        stall_timeout_s: time after which work that stands still is given up.
        member_timeout_s: time after which the coordinator drops a silent member.
    """

    run_id: str
    rollout: RolloutSection
    samples_per_prompt: int
    filter: FilterSection
    redis_url: str
    redis_timeout_s: float
    payload_limit_bytes: int
    max_attempts: int
    lease_ttl_s: float
    stall_timeout_s: float
    member_timeout_s: float


@dataclass(frozen=True, slots=True)
class WorkerClients:
    """The services that a worker calls, and closes. ``reference`` is None where the run needs no reference."""

    coordinator: CoordinatorClient
    reward: RewardClient
    reference: ReferenceClient | None


class Worker:
    """A rollout worker without its engine. Belongs to the running event loop.

    Args:
        settings: the settings.
        clients: the services that the worker calls.
        renderers: one renderer for each kind of lease.
        tokenizer: the policy's tokenizer.

    Raises:
        ConfigError: `rollout.address` is malformed.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        clients: WorkerClients,
        renderers: Mapping[LeaseKind, PromptRenderer],
        tokenizer: Tokenizer,
    ) -> None:
        parse_address(settings.rollout.address, "rollout.address")
        self._settings = settings
        self._clients = clients
        self._renderers = renderers
        self._tokenizer = tokenizer
        self._counts = GenerationCounts()
        self._redis = connect(settings.redis_url, settings.redis_timeout_s)
        self._scorer = Scorer(
            clients.reward,
            clients.reference,
            attempts=settings.rollout.scoring_attempts,
            timeout_s=settings.rollout.scoring_timeout_s,
        )
        ledger = Ledger(self._redis, settings.run_id, settings.payload_limit_bytes, settings.max_attempts)
        self._delivery = Delivery(ledger, clients.coordinator, settings.lease_ttl_s, settings.filter)

    async def run(self, engine: Engine, stop: asyncio.Event) -> int:
        """Work until ``stop`` is set or the run is over.

        Returns:
            The exit code of the process: 1 if the run has failed, else 0. The failure happened in another service.

        Raises:
            StartAgainError: the engine died, hangs or is tainted; a new worker may go on.
            RollMeshError: this worker cannot go on; the coordinator knows the failure.
        """
        settings = self._settings
        runner = GroupRunner(
            engine,
            self._scorer,
            self._renderers,
            self._tokenizer,
            has_reference=self._clients.reference is not None,
            counts=self._counts,
        )
        # Scoring ends by its own deadline, which may be longer than the stall timeout. The engine's watch comes first.
        patience_s = max(settings.stall_timeout_s, settings.rollout.scoring_timeout_s) + STALL_MARGIN_S
        keeper = LeaseKeeper(settings.lease_ttl_s, patience_s, AwakeClock(settings.member_timeout_s))
        max_open_groups = settings.rollout.open_groups(settings.samples_per_prompt)
        pool = GroupPool(runner, self._delivery, keeper, self._counts, max_open_groups)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._redis.aclose)
            await stack.enter_async_context(self._clients.coordinator)
            weights = WeightProtocol(engine)
            stack.push_async_callback(weights.close)
            engine_watch = EngineWatch(
                engine,
                lambda: self._counts.num_samples_generating,
                lambda: weights.is_loading,
                settings.stall_timeout_s,
                AwakeClock(settings.member_timeout_s),
            )
            servicer = RolloutServicer(weights, lambda: self._status(engine, pool))
            server = Server(settings.rollout.address, servicer.as_services(), place="rollout.address")
            await stack.enter_async_context(server)
            membership = Membership(
                self._clients.coordinator,
                settings.run_id,
                Role.ROLLOUT,
                server.address,
                engine.num_weight_ranks,
                report=lambda: self._report(engine, keeper, engine_watch),
                on_answer=keeper.heard,
                serving=lambda: engine.version,
            )
            await stack.enter_async_context(membership)
            stack.push_async_callback(self._close_scorers)
            await self._work(engine_watch, pool, weights, membership, stop)
        if membership.run_state is RunState.FAILED:
            _logger.error("the run has failed: %s", membership.failure)
            return 1
        return 0

    async def _work(
        self,
        engine_watch: EngineWatch,
        pool: GroupPool,
        weights: WeightProtocol,
        membership: Membership,
        stop: asyncio.Event,
    ) -> None:
        """Work until the stop signal, the end of the run, or the failure of a task of this method.

        Raises:
            StartAgainError: the engine died, hangs or is tainted. Another engine does not have the fault.
        """
        source = self._clients.coordinator.lease_stream(lost_timeout_s=membership.registration.member_timeout_s)
        grace_s, reason = 0.0, "the worker failed"
        with _replaceable_if_tainted():
            async with Supervisor() as supervisor:
                supervisor.spawn(weights.watch(), "weights")
                supervisor.spawn(engine_watch.run(), "engine")
                stopping = supervisor.spawn(stop.wait(), "stop", may_end=True)
                over = supervisor.spawn(membership.wait_over(), "membership", may_end=True)
                running = supervisor.spawn(self._take_groups(pool, source), "groups", may_end=True)
                try:
                    await asyncio.wait({stopping, over}, return_when=asyncio.FIRST_COMPLETED)
                    if over.done():
                        reason = f"the run is {over.result().run_state.value}"
                    else:
                        grace_s, reason = _STOP_GRACE_S, "the worker was told to stop"
                finally:
                    _logger.info("closing: %s", reason)
                    await pool.close(running, source, grace_s, reason)

    async def _take_groups(self, pool: GroupPool, source: LeaseStream) -> None:
        info = await self._clients.reward.connect(self._settings.rollout.start_timeout_s)
        _logger.info("reward server %r takes %d samples at a time", info.name, info.max_in_flight)
        await pool.run(source)

    async def _close_scorers(self) -> None:
        await self._clients.reward.close()
        if self._clients.reference is not None:
            await self._clients.reference.close()

    def _report(self, engine: Engine, keeper: LeaseKeeper, engine_watch: EngineWatch) -> MemberReport:
        counts, num_tokens = self._counts, engine.num_generated_tokens
        num_moves = num_tokens + counts.num_samples_scored + counts.num_groups_committed
        scoring_s = self._settings.rollout.scoring_timeout_s if self._scorer.num_scoring else 0.0
        return MemberReport(
            num_generated_tokens=num_tokens,
            num_moves=num_moves,
            patience_s=max(scoring_s, engine_watch.patience_s),
            renewals=keeper.renewals(num_moves),
        )

    def _status(self, engine: Engine, pool: GroupPool) -> RolloutStatus:
        return RolloutStatus(
            version=engine.version,
            num_groups_open=pool.num_groups_open,
            num_samples_generating=self._counts.num_samples_generating,
            num_samples_scoring=self._scorer.num_scoring,
            num_generated_tokens=self._counts.num_generated_tokens,
            num_groups_committed=self._counts.num_groups_committed,
        )


@contextlib.contextmanager
def _replaceable_if_tainted() -> Iterator[None]:
    """Turn a TaintedError inside the block into a StartAgainError."""
    try:
        yield
    except TaintedError as error:
        raise StartAgainError(str(error)) from error
