"""One run of a mesh on this machine: start the services, watch them, end them in order, record how the run ended.

::

    coordinator ─► reward, reference, rollout-*, learner
        │ status, once a second
        ▼
    progress line ─► run over | a process died | a signal ─► stop in order ─► accounting.json, report.md

The launcher asks the coordinator for the status of the run. Every wait has a deadline. A process that ends before the
run is over ends the run, unless `restarts` starts the process again. The cause of a failure is the process that ended
first. A process that ended later, or that the launcher stopped, is no cause.

The first signal ends the run in order. The second signal kills all services at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path

from rollmesh.aio.awake import AwakeClock
from rollmesh.aio.service import stop_signals
from rollmesh.errors import RollMeshError
from rollmesh.replay.accounting import EndState
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.telemetry.crash import full_disk, report_crash
from rollmesh.types import MeshStatus, RunState
from services.config import MeshConfig
from services.launcher.closing import close_books
from services.launcher.missing_members import MissingMembers
from services.launcher.outcome import Outcome
from services.launcher.processes import (
    ProcessGroup,
    ServiceDiedError,
    ServiceProcess,
    service_command,
)
from services.launcher.progress import ProgressLine
from services.launcher.restarts import Restarts

COORDINATOR_START_S = 30.0
"""Time for the coordinator to answer for the first time."""
LEAVE_S = 60.0
"""Time for services to end by themselves after the run is over. The learner may be exporting its model."""
STOP_S = 15.0
"""Time for one service to end after SIGTERM."""
STOP_FAILED_S = 4.0
"""`STOP_S` for a run that failed: its services have no work to hand back, as the coordinator or Redis may be gone."""
STATUS_SILENCE_S = 30.0
"""Time for which the coordinator may fail to answer. Then the coordinator is killed."""
ASLEEP_S = 15.0
"""A launcher that looked at no service for this long was asleep. The coordinator was not silent meanwhile."""
EARLY_END_S = 10.0
"""Time between the end of a service and the coordinator's word that the run is over. Later, the run fails."""
STAGES = {"coordinator": 0, "reward": 1, "reference": 1, "rollout": 2, "learner": 2}
"""A service uses services of lower stages. At the end of a run the services of the highest stage are stopped first."""
EXIT_OK, EXIT_FAILED = 0, 1


def member_names(config: MeshConfig) -> list[str]:
    """Return the names of the members that the launcher starts, in the order of their starts."""
    names = ["reward"] if config.reward.function else []
    names += ["reference"] if config.has_reference else []
    return [*names, *(f"rollout-{index}" for index in range(config.rollout.num_workers)), "learner"]


class LocalRun:
    """One run of a mesh on this machine.

    Args:
        config: the resolved configuration: ports are chosen, and the URL of Redis is set.
        folder: the run folder.
        server: the run's own Redis; None where the configuration names a Redis.
    """

    def __init__(self, config: MeshConfig, folder: Path, server: EmbeddedRedis | None) -> None:
        self._config = config
        self._folder = folder
        self._server = server
        self._config_path = folder / "mesh.yaml"
        self._group = ProcessGroup()
        self._client = CoordinatorClient(config.coordinator.address, "launcher", "launcher")
        self._progress = ProgressLine(sys.stderr, member_names(config))
        self._interrupted = asyncio.Event()
        self._hurried = asyncio.Event()
        self._signal = signal.SIGINT
        self._clock = AwakeClock(ASLEEP_S)
        self._last_answer = self._clock()
        self._first_end: float | None = None
        self._restarts = Restarts(server, folder, self._warn)
        self._missing = MissingMembers()
        self.is_finishing = False
        """Whether the run is over. Its members may still have to end."""
        self.is_stopping = False
        """Whether the services are being stopped."""

    async def run(self) -> int:
        """Run the mesh until the run completes, fails or is interrupted, and record its end. Return the exit code."""
        self._catch_signals()
        stop_timeout_s = STOP_S
        try:
            outcome = await self._until_over()
            if outcome.state is EndState.FAILED:
                stop_timeout_s = STOP_FAILED_S
            if outcome.reason:
                kind = "error" if outcome.state is EndState.FAILED else outcome.state.value
                print(f"{kind}: {outcome.reason}", file=sys.stderr, flush=True)
                await self._tell_coordinator(outcome.reason)
        finally:
            await self._stop(stop_timeout_s)
        await close_books(self._config, self._folder, self._server, outcome, self._restarts.made, self._hurried)
        return outcome.exit_code

    def _catch_signals(self) -> None:
        """End the run on SIGINT, SIGTERM and SIGHUP. A SIGHUP that is ignored (`nohup`) stays ignored."""
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._interrupt, number)

    def _interrupt(self, number: signal.Signals) -> None:
        if self._interrupted.is_set():
            print("\na second signal: all services are killed", file=sys.stderr, flush=True)
            self._hurried.set()
            self._group.kill_all()
            return
        self._signal = number
        self._interrupted.set()

    async def _until_over(self) -> Outcome:
        """Start all services, watch until the run is over, and return its outcome. No error leaves this method."""
        try:
            await self._start_all()
            if not await self._watch():
                return self._interruption()
            return await self._conclude()
        except ServiceDiedError as error:
            return Outcome(EndState.FAILED, EXIT_FAILED, str(error), error.culprit, error.log)
        except RollMeshError as error:
            return Outcome(EndState.FAILED, EXIT_FAILED, str(error))
        except Exception as error:  # noqa: BLE001 - after any error the services have to be ended, and the end recorded
            return Outcome(EndState.FAILED, EXIT_FAILED, report_crash(error), "launcher")
        finally:
            self._progress.finish()

    async def _start_all(self) -> None:
        await self._start("coordinator", "coordinator")
        await self._wait_for_coordinator()
        for name in member_names(self._config):
            if self._interrupted.is_set():
                return
            await self._start(name.partition("-")[0], name)

    async def _start(self, service: str, name: str) -> None:
        command = service_command(service, name, self._config_path)
        has_ranks = service == "learner" and self._config.learner.num_ranks > 1
        process = ServiceProcess(name, command, self._log(name), stage=STAGES[service], has_ranks=has_ranks)
        await self._group.start(process)

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    async def _wait_for_coordinator(self) -> None:
        deadline = time.monotonic() + COORDINATOR_START_S
        while not self._interrupted.is_set():
            await self._raise_if_dead()
            if await self._status() is not None:
                return
            if time.monotonic() > deadline:
                place = self._config.coordinator.address
                raise self._silence(f"does not answer on {place} after {COORDINATOR_START_S:.0f} s")
            await asyncio.sleep(0.1)

    def _silence(self, problem: str) -> ServiceDiedError:
        log = self._log("coordinator")
        return ServiceDiedError(f"coordinator {problem}; its log is {log}", "coordinator", log)

    @property
    def _is_coordinator_gone(self) -> bool:
        return any(service.name == "coordinator" for service in self._group.ended())

    async def _status(self) -> MeshStatus | None:
        """Return the coordinator's status; None where the coordinator does not answer.

        Where the coordinator's process has ended, the answer is None at once.
        """
        if self._is_coordinator_gone:
            return None
        try:
            status = await self._client.status()
        except RollMeshError:
            return None
        self._last_answer = self._clock()
        return status

    def _warn(self, sentence: str) -> None:
        self._progress.finish()
        print(f"warning: {sentence}", file=sys.stderr, flush=True)

    async def _raise_if_dead(self) -> None:
        """Start a dead process again where `restarts` may; else raise the error of the service that died first.

        Redis is checked first: without Redis all services end, in any order.

        Raises:
            ServiceDiedError: a service or Redis died, and is not started again.
        """
        await self._restarts.keep_redis()
        for failed in self._group.failures():
            if await self._is_taken_care_of(failed):
                continue
            # The launcher may see the end of a member before the coordinator says that the run failed.
            status = await self._status()
            if status is not None and status.run_state is RunState.FAILED:
                raise self._failed(status)
            problem = failed.failure(self._restarts.used_up(failed.name)) + full_disk(self._folder)
            raise ServiceDiedError(problem, failed.name, failed.log)

    async def _is_taken_care_of(self, failed: ServiceProcess) -> bool:
        """Return whether a service that failed is started again, or would have been if the run had not finished."""
        if self.is_finishing:
            return self._restarts.is_due(failed.name)
        is_taken = await self._restarts.take(failed)
        if is_taken and failed.name == "coordinator":
            self._last_answer = self._clock()
        return is_taken

    def _failed(self, status: MeshStatus) -> ServiceDiedError:
        """Return the coordinator's reason for the failure as an error.

        The reason begins with the name of a member where a member reported the failure.
        """
        reason = " ".join(status.failure.split())
        name = reason.partition(": ")[0]
        culprit = name if name in member_names(self._config) else ""
        log = self._log(culprit) if culprit else None
        suffix = f"; its log is {log}" if log else ""
        return ServiceDiedError(reason + full_disk(self._folder) + suffix, culprit, log)

    def _raise_if_left_early(self) -> None:
        """Raise ServiceDiedError if a service ended with success although the run goes on.

        At the end of a run the last status may lag behind; therefore `EARLY_END_S` passes before the error.
        """
        ended = [service for service in self._group.ended() if service.exit_code == 0]
        if not ended:
            self._first_end = None
            return
        self._first_end = self._first_end or time.monotonic()
        if time.monotonic() - self._first_end > EARLY_END_S:
            left = ended[0]
            problem = f"{left.name} ended although the run goes on; its log is {left.log}"
            raise ServiceDiedError(problem, left.name, left.log)

    async def _watch(self) -> bool:
        """Show progress until the run is over. Return whether the run finished; False if a signal interrupted the run.

        Raises:
            ServiceDiedError: the run failed, or a process died and is not started again.
        """
        while not self._interrupted.is_set():
            await self._restarts.keep_redis()  # first: without Redis the coordinator would not answer
            status = await self._status()
            if status is None and self._has_learner_finished:
                return True
            if status is not None:
                self._progress.show(status)
                if status.run_state is RunState.FAILED:
                    raise self._failed(status)
                if status.run_state.is_over:
                    return True
            self._kill_silent(status)
            await self._raise_if_dead()
            self._raise_if_left_early()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._interrupted.wait(), 1.0)
        return False

    @property
    def _has_learner_finished(self) -> bool:
        """Whether the learner ended with success. It does so only when the coordinator has said that the run finished.

        A coordinator that dies at the end of the run may tell the learner of the end, and not this launcher.
        """
        return any(service.name == "learner" and service.exit_code == 0 for service in self._group.ended())

    def _kill_silent(self, status: MeshStatus | None) -> None:
        """Kill the processes that run and do nothing, so that they are started again like processes that died."""
        if status is not None and status.run_state in (RunState.STARTING, RunState.RUNNING):
            for service in self._missing.look(status, self._group.running()):
                service.kill("sent no heartbeats any more")
        elif status is None and self._clock() - self._last_answer > STATUS_SILENCE_S:
            self._last_answer = self._clock()
            for service in self._group.running():
                if service.name == "coordinator":
                    service.kill(f"has not answered for {STATUS_SILENCE_S:.0f} s")

    async def _conclude(self) -> Outcome:
        """Wait for the members of a finished run to end. Return the outcome."""
        late = ", ".join(await self._until_members_left())
        if late and self._interrupted.is_set():
            return self._interruption(f"; the run was over, and {late} had still to end")
        if late:
            print(f"warning: {late} did not end in {LEAVE_S:.0f} s", file=sys.stderr, flush=True)
        await self._raise_if_dead()
        return Outcome(EndState.COMPLETED, EXIT_OK)

    def _interruption(self, suffix: str = "") -> Outcome:
        reason = f"the launcher was told to stop by {self._signal.name}{suffix}"
        return Outcome(EndState.INTERRUPTED, 128 + self._signal, reason)

    async def _until_members_left(self) -> list[str]:
        """Wait up to `LEAVE_S`, or until a signal, for the members to end. Return the names of those that still run."""
        names = member_names(self._config)
        self.is_finishing = True
        leaving = asyncio.create_task(self._group.wait_all(names, LEAVE_S), name="members leave")
        signalled = asyncio.create_task(self._interrupted.wait(), name="signal")
        await asyncio.wait({leaving, signalled}, return_when=asyncio.FIRST_COMPLETED)
        for task in (leaving, signalled):
            task.cancel()
        ended = {service.name for service in self._group.ended()}
        return [name for name in names if name not in ended]

    async def _tell_coordinator(self, reason: str) -> None:
        """Tell the coordinator the reason for the end, before any service is stopped.

        Otherwise the coordinator would take a service that the launcher stops for the cause of the end.
        """
        if self._is_coordinator_gone:
            return
        with contextlib.suppress(RollMeshError):
            await self._client.fail_run(self._config.run.name, reason)

    async def _stop(self, timeout_s: float) -> None:
        self.is_stopping = True
        await self._group.stop_all(timeout_s)
        await self._client.close()
