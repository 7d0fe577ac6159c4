"""One learner process: builds the parts, runs the loop, and returns the exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from types import FrameType

import transformers

from rollmesh.aio import stop_signals
from rollmesh.errors import RollMeshError, RunEndedError, StartAgainError
from rollmesh.replay.batches import BatchQueue
from rollmesh.replay.connection import check_server, connect_blocking
from rollmesh.telemetry import logs
from rollmesh.telemetry.crash import describe_crash
from services.config import MeshConfig
from services.learner.composition import (
    build_checkpoint_store,
    build_intake,
    build_loop,
    build_publisher,
    build_recorder,
    build_trainer,
    load_learnables,
)
from services.learner.control import Control
from services.learner.loop import LoopResources
from services.learner.metrics import MetricsFile
from services.learner.phase import PhaseTracker
from services.learner.ranks import Ranks
from services.learner.start import begin

_logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal asked the learner to end. Raised in the main thread; only `run` catches it."""


def run(config: MeshConfig, name: str) -> int:
    """Run this rank until the run is over.

    Args:
        config: the mesh's configuration.
        name: the name of this member.

    Returns:
        0 if the run finished; 128 + the signal's number if a signal asked the process to end.

    Raises:
        StartAgainError: this rank lost another rank. The error of the other rank is the cause, if there is one.
        RollMeshError: the run failed.
    """
    rank = int(os.environ.get("RANK", "0"))
    logs.configure(config.run.name, name if rank == 0 else f"{name}-rank-{rank}")
    quiet_libraries()
    check_server(config.replay.require_url(), config.replay.timeout_s)
    ranks = Ranks.start(config.learner)
    tracker = PhaseTracker(config.learner.silent_work_timeout_s)
    control = None
    if ranks.is_first:
        control = Control(config.run, config.coordinator.address, config.learner.address, name, tracker)
    try:
        with _signals_raise():
            _train(config, ranks, tracker, control)
    except RunEndedError:
        _leave(control, "")  # the coordinator knows the reason already
        raise
    except Stopped as stopped:
        _logger.warning("stopped by signal %s", stopped)
        _leave(control, f"the learner was stopped by signal {stopped}")
        return 128 + int(str(stopped))
    except BaseException as error:
        sentence = str(error) if isinstance(error, RollMeshError) else describe_crash(error)
        if ranks.is_lost_peer(error):
            sentence = f"rank {rank} lost another rank ({sentence})"
            _leave(control, sentence, is_replaceable=True)
            raise StartAgainError(sentence) from error
        _leave(control, " ".join(sentence.split()))
        raise
    _leave(control, "")
    ranks.stop()
    return 0


def _train(config: MeshConfig, ranks: Ranks, tracker: PhaseTracker, control: Control | None) -> None:
    """Register, build the parts, and run the loop.

    The learner registers first. Otherwise the learner would seem to be absent while the models load.
    """
    registration = control.start() if control is not None else None
    (num_steps,) = ranks.max([registration.num_steps if registration is not None else 0])
    started = time.monotonic()
    learnables = load_learnables(config, ranks)
    learnables.count_work(tracker.moved)
    _logger.info("loaded %s in %.1f s", config.model.path, time.monotonic() - started)
    redis = connect_blocking(config.replay.require_url(), config.replay.timeout_s)
    publisher = build_publisher(config, learnables.policy, ranks, control)
    intake = build_intake(config, BatchQueue(redis, config.run.name), ranks, control)
    checkpoints = build_checkpoint_store(config, ranks)
    newest = None if registration is None else registration.newest_version
    start = begin(intake, checkpoints, learnables, ranks, newest)
    num_batches = int(num_steps) or config.training.steps
    trainer = build_trainer(config, learnables, ranks, num_batches)
    if start.state:
        trainer.load_state(start.state)
    resources = LoopResources(
        ranks=ranks,
        intake=intake,
        trainer=trainer,
        learnables=learnables,
        publisher=publisher,
        checkpoints=checkpoints,
        tracker=tracker,
        reporter=control,
        metrics_file=MetricsFile(config.run.folder / "metrics.jsonl") if ranks.is_first else None,
        recorder=build_recorder(config, ranks, num_batches),
    )
    with contextlib.closing(redis), contextlib.closing(publisher):
        last_step = build_loop(config, resources, start).run()
    _logger.info("trained steps %d to %d", start.step + 1, last_step)


def _leave(control: Control | None, failure: str, *, is_replaceable: bool = False) -> None:
    if control is not None:
        control.stop(failure, is_replaceable=is_replaceable)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise `Stopped` in the main thread at the first of the `stop_signals`, so that the coordinator hears of the end.

    The second signal ends the process at once.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    previous = {number: signal.getsignal(number) for number in stop_signals()}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quiet_libraries() -> None:
    """Switch off progress bars, and warnings that libraries raise about each other."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
