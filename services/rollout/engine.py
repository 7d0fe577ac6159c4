"""Runs one vLLM engine: the engine generates samples, loads weights, and marks every token with its policy version.

The steps of the weight protocol in the engine, in the order of the calls::

    prepare   check the plan against the model; the worker processes begin to join the epoch's process group
    receive   bytes arrive beside the live weights            generation goes on
    commit    pause, load, stamp the version, resume          generation stands still
    abort     in place of any step: leave the group, forget the bytes that arrived

Before the first commit the engine has no version and generates nothing. An engine whose load failed midway is tainted:
the engine holds a mixture of two versions and never generates again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import (
    DeadlineError,
    InvalidArgumentError,
    RollMeshError,
    StartAgainError,
    TaintedError,
    UnavailableError,
    WeightTransferError,
)
from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, SamplingSpec, WeightEpoch, WeightPlan
from rollmesh.weights.plan import check_plan
from services.rollout.completion import Completion, read_completion, sampling_params
from services.rollout.engine_args import EngineSettings
from services.rollout.engine_log import EngineLog
from services.rollout.vllm_process import call_workers, first_line, start_vllm, stop_vllm, vllm_errors

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["Completion", "Engine"]

_log = logging.getLogger(__name__)

_FIRST_POLL_S = 0.002
_LAST_POLL_S = 0.02
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class _InboundTransfer:
    """The transfer that was prepared. ``digests`` holds a digest for each process after the bytes have arrived."""

    deadline_s: float
    digests: tuple[bytes, ...] = ()


class Engine:
    """A running vLLM, made by `Engine.start`. Belongs to the event loop that called `start`."""

    def __init__(self, llm: AsyncLLM, settings: EngineSettings, log: EngineLog) -> None:
        self._llm = llm
        self._log = log
        self._kv = settings.rollout.kv
        self._max_length = settings.model.max_length
        self._commit_timeout_s = settings.weights.commit_timeout_s
        parallel = llm.vllm_config.parallel_config
        self._num_weight_ranks = int(parallel.world_size)
        cache = llm.vllm_config.cache_config
        # vLLM caches whole blocks only: a shorter prompt shares nothing and needs no salt.
        self._salted_from = int(cache.block_size) if cache.enable_prefix_caching else None
        self._version: PolicyVersion | None = None
        self._transfer: _InboundTransfer | None = None
        self._plan: WeightPlan | None = None
        self._is_tainted = False
        self._num_ended_tokens = 0

    @classmethod
    async def start(cls, settings: EngineSettings) -> Engine:
        """Start vLLM on the policy's model folder.

        Raises:
            ConfigError: the model folder or vLLM's settings are at fault.
            DeadlineError: vLLM was not up within `rollout.start_timeout_s`.
            RollMeshError: vLLM did not start; the message gives the cause.
        """
        ModelFolder.read("model.path", settings.model.path).check_trainable()
        log = EngineLog.begin()
        return cls(await start_vllm(settings, log), settings, log)

    @property
    def version(self) -> PolicyVersion | None:
        """The version that generates now; None before the first commit."""
        return self._version

    @property
    def num_weight_ranks(self) -> int:
        """The number of this engine's processes that take part in weight transfers."""
        return self._num_weight_ranks

    @property
    def is_tainted(self) -> bool:
        """Whether a load failed midway. A tainted engine must not be used any more."""
        return self._is_tainted

    @property
    def is_alive(self) -> bool:
        """Whether vLLM's processes run."""
        return not self._llm.errored

    @property
    def num_generated_tokens(self) -> int:
        """The number of tokens generated since the start. Unfinished samples count too."""
        states = self._llm.output_processor.request_states.values()
        return self._num_ended_tokens + sum(int(state.detokenizer.num_output_tokens()) for state in states)

    def explain_death(self) -> str:
        """Return a sentence that says why vLLM's processes have ended."""
        return self._log.explain("vLLM has died", self._llm.dead_error)

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec, seed: int = 0
    ) -> Completion:
        """Generate one completion. Cancelling the call cancels the generation.

        Args:
            request_id: names the request in vLLM's log; need not be unique.
            prompt_token_ids: the tokens of the prompt, [P].
            sampling: the sampling settings.
            seed: the seed of this sample alone; 0 draws from the engine's own random numbers.

        Raises:
            InvalidArgumentError: the prompt leaves no room for an answer, or has tokens that the model does not know.
            UnavailableError: no version is committed yet.
            TaintedError: a load failed midway.
            StartAgainError: vLLM has died.
        """
        room = self._max_length - len(prompt_token_ids)
        if not prompt_token_ids or room < 1:
            raise InvalidArgumentError(
                f"a prompt of {len(prompt_token_ids)} tokens does not fit model.max_length {self._max_length}",
                "prompt_token_ids",
            )
        params = sampling_params(sampling, seed, room)
        while True:
            output = await self._run(request_id, prompt_token_ids, params)
            completion = output.outputs[0]
            if completion.finish_reason == "abort" and not completion.token_ids:
                continue  # a commit took the request back before generation began: see `_restart_waiting`
            return read_completion(completion)

    async def prepare(self, plan: WeightPlan, epoch: WeightEpoch, rank: int, deadline_s: float) -> None:
        """Check the plan and begin to join the epoch's process group, which `receive` waits for.

        `prepare` does not wait for the group. The group is complete when the learner has joined, and the learner hears
        of the epoch only after all members have prepared.

        Args:
            plan: the tensors that the learner will send.
            epoch: the process group that carries the tensors.
            rank: the rank of this engine's first process in the group.
            deadline_s: time for joining, and the same time again for the transfer.

        Raises:
            InvalidArgumentError: the plan does not fit the model, or the rank is not in the epoch.
            TaintedError: a load failed midway.
        """
        self._check_health()
        if not 1 <= rank <= epoch.world_size - self._num_weight_ranks:
            raise InvalidArgumentError(
                f"{self._num_weight_ranks} processes from rank {rank} on do not fit into {epoch.world_size}", "rank"
            )
        await self._hold_plan(plan)
        await call_workers(self._llm, "mesh_join", asdict(epoch), rank, deadline_s)
        self._transfer = _InboundTransfer(deadline_s)

    async def receive(self, version: PolicyVersion) -> ReceiveReport:
        """Receive the prepared transfer while generation goes on. After an error, call `abort`.

        Raises:
            DeadlineError: joining or the transfer took too long.
            WeightTransferError: the transfer failed, was aborted, or was not prepared.
        """
        transfer = self._transfer
        if transfer is None:
            raise WeightTransferError(f"version {version} was not prepared")
        await call_workers(self._llm, "mesh_receive", transfer.deadline_s)
        answers = await self._poll_transfer(2 * transfer.deadline_s + _GRACE_S)
        if self._transfer is not transfer:
            raise WeightTransferError(f"the transfer of version {version} was aborted")
        digests = tuple(answer["digest"] for answer in answers)
        self._transfer = _InboundTransfer(transfer.deadline_s, digests)
        return ReceiveReport(digests, answers[0]["num_bytes"], max(answer["transfer_s"] for answer in answers))

    async def commit(self, version: PolicyVersion) -> CommitReport:
        """Load the received weights. The engine generates as ``version`` from the next token on.

        Raises:
            TaintedError: loading failed, or took longer than `weights.commit_timeout_s`.
            WeightTransferError: nothing was received, or the processes' digests differ; the old version serves on.
        """
        self._check_health()
        transfer = self._transfer
        if transfer is None or not transfer.digests:
            raise WeightTransferError(f"version {version} was not received")
        if len(set(transfer.digests)) != 1:
            raise WeightTransferError(f"the engine's processes received different bytes for version {version}")
        try:
            async with asyncio.timeout(self._commit_timeout_s):
                with vllm_errors(f"loading version {version}"):
                    report = await self._load(version, transfer.digests[0])
        except TimeoutError as error:
            raise self._taint(f"version {version} was not loaded after {self._commit_timeout_s:g} s") from error
        except RollMeshError as error:
            raise self._taint(f"version {version} could not be loaded: {error}") from error
        self._transfer = None
        return report

    async def abort(self) -> None:
        """Leave the group and forget the prepared or received transfer. Never fails; the old version serves on."""
        self._transfer = None
        with suppress(RollMeshError):
            await call_workers(self._llm, "mesh_abort")

    async def stop(self) -> None:
        """End vLLM's processes, within a bounded time."""
        await stop_vllm(self._llm)

    async def _hold_plan(self, plan: WeightPlan) -> None:
        """Check a plan, and give the plan to the worker processes. Do nothing if the processes hold the plan already.

        The plan is the same object at every version. Sending the 46,000 tensors of a mixture of experts takes a second.

        Raises:
            InvalidArgumentError: the plan's buckets or digest do not match the plan's tensors.
        """
        from services.rollout.vllm_plugin import plan_to_message

        if plan is self._plan:
            return
        check_plan(plan)
        await call_workers(self._llm, "mesh_hold_plan", plan_to_message(plan))
        self._plan = plan

    async def _run(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> RequestOutput:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        self._check_health()
        if self._version is None:
            raise UnavailableError("the engine has no policy version yet", retry_after_s=1.0)
        is_salted = self._salted_from is not None and len(prompt_token_ids) >= self._salted_from
        prompt = tokens_input(prompt_token_ids, cache_salt=str(self._version) if is_salted else None)
        try:
            collector = await self._llm.add_request(request_id, prompt, params)
            try:
                output: RequestOutput = await collector.get()
                self._num_ended_tokens += len(output.outputs[0].token_ids)
                return output
            except asyncio.CancelledError:
                state = self._llm.output_processor.request_states.get(collector.request_id)
                self._num_ended_tokens += 0 if state is None else state.detokenizer.num_output_tokens()
                await self._llm.abort(collector.request_id, internal=True)
                raise
            finally:
                collector.close()
        except (VLLMClientError, ValueError) as error:
            raise InvalidArgumentError(first_line(error), "prompt_token_ids") from error
        except EngineDeadError as error:
            raise StartAgainError(self.explain_death()) from error

    async def _load(self, version: PolicyVersion, digest: bytes) -> CommitReport:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm, kv = self._llm, self._kv
        called = time.perf_counter()
        # Not `llm.pause_generation`, which sleeps for 20 ms at every version without need.
        await llm.engine_core.pause_scheduler_async(
            mode="wait" if kv == "drain" else "keep",
            clear_cache=kv != "keep",  # with kept requests, clearing makes vLLM compute their caches anew
        )
        paused = time.perf_counter()
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info={"digest": digest}))
        await llm.finish_weight_update(weight_version=str(version))
        loaded = time.perf_counter()
        self._version = version
        await self._restart_waiting()
        await llm.resume_generation()
        # A drain goes on generating until the scheduler has paused.
        stood_still_from = paused if kv == "drain" else called
        return CommitReport(pause_s=time.perf_counter() - stood_still_from, load_s=loaded - paused)

    async def _restart_waiting(self) -> None:
        """Take back the requests without a token, so that `generate` sends them again under the new version.

        These requests carry the old version's salt. For a prompt in the prefix cache, the engine would compute tokens
        of the new version from keys and values of the old version.
        """
        if self._kv != "keep" or self._salted_from is None:
            return  # the cache is empty or off
        waiting = [
            request_id
            for request_id, state in self._llm.output_processor.request_states.items()
            if state.prompt_len >= self._salted_from and state.detokenizer.num_output_tokens() == 0
        ]
        if waiting:
            await self._llm.abort(waiting, internal=True)
            await asyncio.sleep(0)  # lets `generate` queue them again, in their order, before the engine resumes

    async def _poll_transfer(self, timeout_s: float) -> list[dict[str, Any]]:
        """Ask the worker processes until all have received. The pause between two questions grows."""
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_POLL_S
        while True:
            answers = await call_workers(self._llm, "mesh_poll")
            for answer in answers:
                if answer["state"] == "failed":
                    raise (DeadlineError if answer["is_late"] else WeightTransferError)(answer["reason"])
            if all(answer["state"] == "done" for answer in answers):
                return answers
            if time.monotonic() > deadline:
                raise DeadlineError(f"the transfer took over {timeout_s:.1f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LAST_POLL_S)

    def _check_health(self) -> None:
        if self._is_tainted:
            raise TaintedError("the engine is tainted by a load that failed")

    def _taint(self, reason: str) -> TaintedError:
        """Keep the engine paused for good, and end the requests in flight. Return the error that the caller raises."""
        _log.error("the engine is tainted: %s", reason)
        self._is_tainted = True
        self._transfer = None
        error = TaintedError(f"the engine is tainted: {reason}")
        self._llm.output_processor.propagate_error(error)
        return error
