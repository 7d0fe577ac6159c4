"""The coordinator's process: checks addresses, Redis and datasets, composes the coordinator, serves to the run's end.

Order at the end: the run is over or a signal came → leases end → members leave (within the time after which a silent
member would be dropped) → the accounting is written → the server stops → exit code 0 for a run that is FINISHED or was
stopped, else an error that says why the run failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from rollmesh.aio.awake import AwakeClock
from rollmesh.aio.service import run_service
from rollmesh.aio.supervisor import Supervisor
from rollmesh.config.section import Section
from rollmesh.config.shared import RunSection
from rollmesh.data.datasets import PromptDataset, open_dataset
from rollmesh.errors import ConfigError, RunEndedError, UnavailableError
from rollmesh.replay.accounting import EndState, account, write_accounting
from rollmesh.replay.claim import RunClaim
from rollmesh.replay.connection import check_server, connect
from rollmesh.replay.coordinator_ledger import CoordinatorLedger
from rollmesh.replay.identity import RunIdentity, describe_server
from rollmesh.rpc.channel import parse_address
from rollmesh.rpc.rollout_client import RolloutClient
from rollmesh.rpc.server import Server
from rollmesh.telemetry import logs
from rollmesh.types import EvaluationResult, GroupState, RunState
from rollmesh.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from services.config import MeshConfig
from services.coordinator.admission import Admission
from services.coordinator.config import CoordinatorSection
from services.coordinator.coordinator import Coordinator
from services.coordinator.evaluation import EvaluationRound, Evaluator
from services.coordinator.evaluation_log import EvaluationLog
from services.coordinator.leases import Dispatcher
from services.coordinator.members import Clock, Members
from services.coordinator.prompts import EVAL, TRAIN, HeldOut, PromptBook
from services.coordinator.publish import PublishDriver, PublishSettings
from services.coordinator.renewals import Renewals
from services.coordinator.run import Run
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.token_meter import TokenMeter
from services.coordinator.versions import VersionBook
from services.coordinator.watch import ASLEEP_S, Watch

logger = logging.getLogger(__name__)

SERVICE = "rollmesh.v1.CoordinatorService"
ACCOUNTING_TIMEOUT_S = 30.0
LINGER_S = 3.0
"""Seconds for which the coordinator answers questions about a run that is over, even if all members have left."""


def main(config: MeshConfig, name: str) -> int:
    """Run the coordinator until the run is over.

    Raises:
        ConfigError: an address, the Redis or a dataset that the configuration names cannot be used.
        RunEndedError: the run failed; the message says why.
    """
    logs.configure(config.run.name, name)
    _check_address(config.coordinator.address)
    check_server(config.replay.require_url(), config.replay.timeout_s)
    train = open_dataset(config.data, TRAIN)
    held_out = None
    if config.evaluation is not None:
        held_out = HeldOut(open_dataset(config.evaluation.data, EVAL, "evaluation.data"), config.evaluation)
    return run_service(lambda stop: serve(config, train, held_out, stop), name)


def _check_address(address: str) -> None:
    place = "coordinator.address"
    if parse_address(address, place).port == 0:
        raise ConfigError(place, f"{address!r} leaves the port open, and members could not find it", "name a port")


async def serve(config: MeshConfig, train: PromptDataset, held_out: HeldOut | None, stop: asyncio.Event) -> int:
    """Serve until the run is over and its members have left, or until ``stop``.

    Raises:
        RunEndedError: the run failed.
    """
    url = config.replay.require_url()
    redis = connect(url, config.replay.timeout_s)
    try:
        limit_bytes, max_attempts = config.replay.payload_limit_bytes, config.coordinator.max_attempts
        server_name = describe_server(url)
        trained = (config.model, config.data, config.training, config.sampling, config.algorithm)
        identity = _identity(config.run, trained)
        outage_timeout_s, may_adopt = config.replay.outage_timeout_s, config.run.id is None
        claim = RunClaim(redis, config.run.name, identity, server_name, outage_timeout_s, may_adopt=may_adopt)
        claimed = await claim.take()
        ledger = CoordinatorLedger(redis, config.run.name, limit_bytes, max_attempts, term=claimed.term)
        coordinator, watch = build(config, ledger, train, held_out, AwakeClock(ASLEEP_S))
        await restore(coordinator, ledger)
        if claimed.former_state == RunState.FAILED.value:
            coordinator.fail("the run had failed before its coordinator was started again")
        services = {SERVICE: (add_CoordinatorServiceServicer_to_server, CoordinatorServicer(coordinator))}
        async with Server(config.coordinator.address, services, place="coordinator.address") as server:
            logger.info("coordinating run %s at %s", config.run.name, server.address)
            async with Supervisor() as tasks:
                tasks.spawn(coordinator.dispatcher.run(), "dispatcher")
                tasks.spawn(watch.run(), "watch")
                tasks.spawn(_fail_without_claim(claim, coordinator), "claim", may_end=True)
                await _until_over(coordinator.run, stop)
                coordinator.dispatcher.close_all()
                await _note_end(claim, coordinator.run.state)
                linger = asyncio.timeout(LINGER_S)
                await _until_left(coordinator, config.coordinator.member_timeout_s, stop)
                with contextlib.suppress(TimeoutError):
                    async with linger:
                        await stop.wait()
            await _write_books(coordinator, ledger, config.run.folder / "accounting.json")
            await coordinator.publish_driver.close()
            await _release(claim, coordinator.run.state)
    finally:
        await redis.aclose()
    if coordinator.run.state is RunState.FAILED:
        raise RunEndedError(f"the run failed: {coordinator.run.failure}")
    return 0


def _identity(run: RunSection, trained: Sequence[Section]) -> RunIdentity:
    """Return the run's own id, and a digest of the sections that decide what is trained."""
    text = "\n".join(section.model_dump_json() for section in trained)
    return RunIdentity(run.id or secrets.token_hex(8), hashlib.sha256(text.encode()).hexdigest()[:16])


async def restore(coordinator: Coordinator, ledger: CoordinatorLedger) -> None:
    """Bring a coordinator to the state that the ledger shows: of a new run, or of a run that goes on.

    Raises:
        UnavailableError: Redis is away.
    """
    newest = await ledger.newest_version()
    holders = await ledger.holders()
    if newest is not None:
        logger.info("the run goes on after step %d, with version %s", newest.step, newest.version)
    coordinator.restore(newest, holders)


async def _fail_without_claim(claim: RunClaim, coordinator: Coordinator) -> None:
    coordinator.fail(await claim.until_lost())


async def _note_end(claim: RunClaim, state: RunState) -> None:
    """Tell Redis at once that the run ended, so that no coordinator goes on with it."""
    if state.is_over:
        with contextlib.suppress(UnavailableError):  # `_release` tries again.
            await claim.note_end(state.value)


async def _release(claim: RunClaim, state: RunState) -> None:
    try:
        await claim.release(state.value if state.is_over else "interrupted")
    except UnavailableError as error:
        logger.warning("Redis could not be told that the run is over: %s", error)


def build(
    config: MeshConfig, ledger: CoordinatorLedger, train: PromptDataset, held_out: HeldOut | None, clock: AwakeClock
) -> tuple[Coordinator, Watch]:
    """Compose the coordinator of a configuration. This starts nothing."""
    section, training = config.coordinator, config.training
    prompts = PromptBook(train, config.data, training, config.sampling, config.run.seed, held_out)
    admission = Admission(training.num_slots, training.prompts_per_step, training.steps, len(prompts))
    run = Run(config.run.name, admission.num_steps)
    members = Members(section.member_timeout_s, clock)
    evaluator = None
    if held_out is not None:
        log = EvaluationLog(config.run.folder / "evaluations.jsonl")
        evaluator = _evaluator(held_out, section, log, admission.num_steps, clock)
    dispatcher = Dispatcher(
        ledger,
        members,
        run,
        prompts,
        admission,
        evaluator,
        section.lease_ttl_s,
        section.max_version_lag,
    )
    settings = PublishSettings(
        config.rollout.num_workers,
        config.rollout.start_timeout_s,
        config.weights.prepare_timeout_s,
        config.weights.commit_timeout_s,
    )

    async def until_unpinned() -> None:
        if evaluator is not None:
            await evaluator.until_unpinned()

    publish_driver = PublishDriver(
        members,
        # Wall-clock microseconds: a coordinator that starts again never repeats an epoch of the one before.
        VersionBook(last_epoch=time.time_ns() // 1000),
        settings,
        RolloutClient,
        until_unpinned,
        lambda version, step: coordinator.before_commit(version, step),
        lambda version, step: coordinator.on_commit(version, step),
        lambda member, reason: coordinator.on_tainted(member, reason),
        clock,
    )
    coordinator = Coordinator(
        run,
        members,
        ledger,
        admission,
        dispatcher,
        Renewals(ledger, evaluator, section.lease_ttl_s),
        publish_driver,
        evaluator,
        TokenMeter(clock),
        section.heartbeat_interval_s,
        section.member_timeout_s,
        section.lease_ttl_s,
    )
    watch = Watch(
        coordinator,
        ledger,
        section.max_failed_fraction,
        training.prompts_per_step,
        section.stall_timeout_s,
        clock,
    )
    return coordinator, watch


def _evaluator(
    held_out: HeldOut, section: CoordinatorSection, log: EvaluationLog, last_step: int, clock: Clock
) -> Evaluator:
    def on_result(finished: EvaluationRound, result: EvaluationResult) -> None:
        log.append(result, finished.num_other_versions)
        logger.info("version %s: pass@1 %.3f ± %.3f", result.version, result.pass_at_1, result.pass_at_1_stderr)

    return Evaluator(
        num_prompts=len(held_out.dataset),
        every_steps=held_out.section.every_steps,
        last_step=last_step,
        should_pin=held_out.section.should_pin_version,
        ttl_s=section.lease_ttl_s,
        max_attempts=section.max_attempts,
        clock=clock,
        # Wall-clock microseconds: a coordinator that starts again never repeats a token of the one before.
        first_token=time.time_ns() // 1000,
        evaluated_steps=log.steps,
        on_result=on_result,
        on_going_back=log.cut,
    )


async def _until_over(run: Run, stop: asyncio.Event) -> None:
    """Wait for the end of the run, or for a signal."""
    waits = [asyncio.ensure_future(run.over.wait()), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _until_left(coordinator: Coordinator, timeout_s: float, stop: asyncio.Event) -> None:
    """Wait until all members have left. Heartbeats tell them of the end; the wait ends after ``timeout_s``."""
    members = coordinator.members
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while len(members) and not stop.is_set():
                members.changed.clear()
                await members.changed.wait()
    if len(members) and coordinator.run.state.is_over:
        logger.warning("ending without %s", ", ".join(member.name for member in members.all))


async def _write_books(coordinator: Coordinator, ledger: CoordinatorLedger, path: Path) -> None:
    try:
        async with asyncio.timeout(ACCOUNTING_TIMEOUT_S):
            books = await account(ledger)
    except (UnavailableError, TimeoutError) as error:
        logger.warning("the run's accounting could not be read from Redis: %s", error)
        return
    books["state"], books["reason"] = EndState.of(coordinator.run.state).value, coordinator.run.failure
    books["shortfall"] = coordinator.shortfall({state: books["num_groups"][state.value] for state in GroupState})
    if books["shortfall"]:
        logger.warning("%s", books["shortfall"])
    try:
        write_accounting(path, books)
    except OSError as error:
        logger.warning("the run's accounting could not be written to %s: %s", path, error.strerror)
