"""Composes one rollout worker, and runs it from its registration to the end of its last group.

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
from typing import NoReturn

from rollmesh.aio.awake import AwakeClock
from rollmesh.aio.supervisor import Supervisor
from rollmesh.config import DataSection, EvaluationSection, ModelSection, ReplaySection, SamplingSection
from rollmesh.data.render import PromptRenderer, Tokenizer
from rollmesh.errors import ConfigError, RollMeshError
from rollmesh.replay.connection import connect
from rollmesh.replay.ledger import Ledger
from rollmesh.rpc.channel import parse_address
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.lease_stream import LeaseStream
from rollmesh.rpc.membership import Membership
from rollmesh.rpc.scorer_clients import ReferenceClient, RewardClient
from rollmesh.rpc.server import Server
from rollmesh.types import LeaseKind, MemberReport, Role, RolloutStatus, RunState
from services.config import MeshConfig
from services.rollout.delivery import Delivery
from services.rollout.engine import Engine
from services.rollout.group import GenerationCounts, GroupRunner
from services.rollout.lease_keeper import LeaseKeeper
from services.rollout.pool import GroupPool
from services.rollout.scoring import Scorer
from services.rollout.servicer import RolloutServicer
from services.rollout.weight_protocol import WeightProtocol

_logger = logging.getLogger(__name__)

_STOP_GRACE_S = 3.0
"""Time that open groups get to end when somebody stops the worker while the run goes on."""
_ENGINE_POLL_S = 0.5
"""Time between two checks of whether the engine is alive."""


class Worker:
    """A rollout worker without its engine. Belongs to the running event loop.

    The constructor composes the worker out of the mesh file's sections.

    Args:
        config: the whole mesh file.
        name: the member's name, e.g. "rollout-0".
        tokenizer: the policy's tokenizer.

    Raises:
        ConfigError: an address or a template cannot be used.
    """

    def __init__(self, config: MeshConfig, name: str, tokenizer: Tokenizer) -> None:
        self._redis = connect(redis_url(config.replay), config.replay.timeout_s)
        self._config = config
        self._tokenizer = tokenizer
        self._renderers = make_renderers(tokenizer, config.model, config.sampling, config.data, config.evaluation)
        self._counts = GenerationCounts()
        parse_address(config.rollout.address, "rollout.address")
        self._client = CoordinatorClient(config.coordinator.address, name)
        self._reward = RewardClient(config.reward.address)
        self._reference: ReferenceClient | None = None
        if config.has_reference:
            assert config.reference is not None, "the configuration was checked"
            self._reference = ReferenceClient(config.reference.address)
        self._scorer = Scorer(
            self._reward,
            self._reference,
            attempts=config.rollout.scoring_attempts,
            timeout_s=config.rollout.scoring_timeout_s,
        )
        limit_bytes, max_attempts = config.replay.payload_limit_bytes, config.coordinator.max_attempts
        ledger = Ledger(self._redis, config.run.name, limit_bytes, max_attempts)
        self._delivery = Delivery(
            ledger,
            self._client,
            config.coordinator.lease_ttl_s,
            config.algorithm.filter,
        )

    async def run(self, engine: Engine, stop: asyncio.Event) -> int:
        """Work until ``stop`` is set or the run is over.

        Returns:
            The exit code of the process: 1 if the run has failed, else 0. The failure happened in another service.

        Raises:
            RollMeshError: this worker cannot go on; the coordinator knows the failure.
        """
        config = self._config
        runner = GroupRunner(
            engine,
            self._scorer,
            self._renderers,
            self._tokenizer,
            has_reference=self._reference is not None,
            counts=self._counts,
        )
        # Scoring ends by its own deadline, which may be longer than the stall timeout.
        patience_s = max(config.coordinator.stall_timeout_s, config.rollout.scoring_timeout_s)
        keeper = LeaseKeeper(
            config.coordinator.lease_ttl_s, patience_s, AwakeClock(config.coordinator.member_timeout_s)
        )
        max_open_groups = config.rollout.open_groups(config.training.samples_per_prompt)
        pool = GroupPool(runner, self._delivery, keeper, self._counts, max_open_groups)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._redis.aclose)
            await stack.enter_async_context(self._client)
            weights = WeightProtocol(engine)
            stack.push_async_callback(weights.close)
            servicer = RolloutServicer(weights, lambda: self._status(engine, pool))
            server = Server(config.rollout.address, servicer.as_services(), place="rollout.address")
            await stack.enter_async_context(server)
            membership = Membership(
                self._client,
                config.run.name,
                Role.ROLLOUT,
                server.address,
                engine.num_weight_ranks,
                report=lambda: self._report(engine, keeper),
                on_answer=keeper.heard,
            )
            await stack.enter_async_context(membership)
            stack.push_async_callback(self._close_scorers)
            await self._work(engine, pool, weights, membership, stop)
        if membership.run_state is RunState.FAILED:
            _logger.error("the run has failed: %s", membership.failure)
            return 1
        return 0

    async def _work(
        self,
        engine: Engine,
        pool: GroupPool,
        weights: WeightProtocol,
        membership: Membership,
        stop: asyncio.Event,
    ) -> None:
        """Work until the stop signal, the end of the run, or the failure of a task of this method."""
        source = self._client.lease_stream(lost_timeout_s=membership.registration.member_timeout_s)
        grace_s, reason = 0.0, "the worker failed"
        async with Supervisor() as supervisor:
            supervisor.spawn(weights.watch(), "weights")
            supervisor.spawn(watch_engine(engine), "engine")
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
        info = await self._reward.connect(self._config.rollout.start_timeout_s)
        _logger.info("reward server %r takes %d samples at a time", info.name, info.max_in_flight)
        await pool.run(source)

    async def _close_scorers(self) -> None:
        await self._reward.close()
        if self._reference is not None:
            await self._reference.close()

    def _report(self, engine: Engine, keeper: LeaseKeeper) -> MemberReport:
        counts, num_tokens = self._counts, engine.num_generated_tokens
        num_moves = num_tokens + counts.num_samples_scored + counts.num_groups_committed
        return MemberReport(
            num_generated_tokens=num_tokens,
            num_moves=num_moves,
            patience_s=self._config.rollout.scoring_timeout_s if self._scorer.num_scoring else 0.0,
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


async def watch_engine(engine: Engine) -> NoReturn:
    """Wait until the engine's processes have died. An idle worker would not notice their death otherwise.

    Raises:
        RollMeshError: always; the message gives the cause of the death.
    """
    while engine.is_alive:  # noqa: ASYNC110 (an engine that dies sets no event)
        await asyncio.sleep(_ENGINE_POLL_S)
    raise RollMeshError(engine.explain_death())


def redis_url(replay: ReplaySection) -> str:
    """Return the address of the run's Redis.

    Raises:
        ConfigError: the mesh file names no Redis.
    """
    if replay.url is None:
        raise ConfigError("replay.url", "is not set", "start the mesh with `rollmesh up`, or name a Redis")
    return replay.url


def make_renderers(
    tokenizer: Tokenizer,
    model: ModelSection,
    sampling: SamplingSection,
    data: DataSection,
    evaluation: EvaluationSection | None,
) -> dict[LeaseKind, PromptRenderer]:
    """Return a renderer for each kind of lease that the run has.

    A prompt may fill ``max_length`` but for the tokens that a sample may generate.

    Raises:
        ConfigError: a template cannot be used.
    """
    max_length, new_tokens = model.max_length, sampling.max_new_tokens
    renderers = {LeaseKind.TRAIN: PromptRenderer(tokenizer, data, max_length - new_tokens)}
    if evaluation is not None:
        limit = max_length - (evaluation.max_new_tokens or new_tokens)
        renderers[LeaseKind.EVALUATE] = PromptRenderer(tokenizer, evaluation.data, limit, "evaluation.data")
    return renderers
